"""Models as named tensors: sources, written files, decoder blocks that run, and what can be said of their tensors."""
