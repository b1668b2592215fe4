"""Grids: the values that a format can store for a weight matrix, and how their scales and offsets are fitted."""
