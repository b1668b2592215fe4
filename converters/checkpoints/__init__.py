"""Reading checkpoints that other tools have quantized, as sources."""
