"""Loads native folders in transformers."""
