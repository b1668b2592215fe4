"""What bytes mean: codecs in NumPy, one file per format family."""
