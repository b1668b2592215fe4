"""Loading native folders in transformers."""
