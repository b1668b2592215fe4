"""Perplexity, KL divergence, task scores and answers of a model."""
