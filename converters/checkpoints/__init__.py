"""Checkpoints that other tools have quantized, as sources."""
