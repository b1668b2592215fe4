"""Writing and reading folders of packed safetensors."""
