"""EXL2 folders for ExLlamaV2: planning, writing and reading."""
