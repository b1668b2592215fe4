"""GGUF files for llama.cpp: writing and reading."""
