"""Planning, writing and reading EXL3 folders for ExLlamaV3."""
