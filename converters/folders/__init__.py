"""Folders of packed safetensors: writing and reading."""
