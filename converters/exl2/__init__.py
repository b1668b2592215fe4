"""Planning, writing and reading EXL2 folders for ExLlamaV2."""
