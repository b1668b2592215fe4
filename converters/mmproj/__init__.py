"""The part of a model that reads images, as a file for llama.cpp (`--mmproj`): families, names, values, metadata."""
