"""Writing and reading GGUF files for llama.cpp."""
