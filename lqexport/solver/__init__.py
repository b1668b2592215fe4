"""Quantization of one linear: error feedback, coordinate descent, and low-rank correction."""
