"""The codecs: NumPy code that packs and decodes the bytes of each format. One file per format family."""
