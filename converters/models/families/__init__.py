"""The entries of the table of architectures: one file for each maker or family of models."""
