"""Compiled inner loops: the solver's for the CPU (numba) and a GPU (CUDA through CuPy), and decoding and products."""
