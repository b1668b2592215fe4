"""Checks of a GGUF file by itself, whoever wrote it: structure, values, metadata, vocabulary. No source is needed."""
