"""Whole-model targets: which tensor gets which codec, tensor names, metadata, files."""
