"""Compiles the loops of `kernels/` for the test processes, which would each compile them for themselves.

`make test` runs it while mypy runs on another core. numba keeps what it compiles beside the sources. What is not
compiled here is compiled by the first test that needs it.
"""

from __future__ import annotations

import torch

from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear

if __name__ == "__main__":
    weights, inputs = torch.randn(64, 512), torch.randn(1024, 512)
    for target, solver in (("gguf:Q2_K", "blocked"), ("gguf:IQ2_XS", "blocked"), ("native:table-3", "exact")):
        settings = Recipe("none", target, solver=solver).solver_settings
        solve_linear("model.layers.0.mlp.up_proj.weight", weights, inputs.T @ inputs, target, settings)
