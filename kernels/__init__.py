"""Hot loops: the solver's, for the CPU (numba) and a GPU (CUDA through CuPy); decoding and products on a GPU."""
