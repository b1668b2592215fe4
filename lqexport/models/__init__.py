"""Models as named tensors: sources, written models, running decoder blocks, smoothing, and lists of tensors."""
