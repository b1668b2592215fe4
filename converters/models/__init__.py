"""Families of models: their tensors' names, and how they compute."""
