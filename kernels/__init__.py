"""Hot loops, compiled: the solver's inner loops for the CPU (numba)."""
