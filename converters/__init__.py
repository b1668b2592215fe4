"""Whole-model formats: the codec of each tensor, tensor names, metadata, and reading and writing files."""
