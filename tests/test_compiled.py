"""Compiled loops give the same bits when just compiled, when loaded from numba's cache, and on other processors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"
SOLVE = """
import hashlib, torch
from lqexport.grids.fit import _fit_cpu, normalized
from lqexport.grids.fit_sections import _best_subs_cpu
from lqexport.formats.registry import codec_named
from lqexport.solver.linear import solve_linear
from lqexport.recipe import Recipe

draw = torch.Generator().manual_seed(1)
weight, inputs = torch.randn(64, 256, generator=draw), torch.randn(512, 256, generator=draw)
hessian = inputs.T @ inputs
importance = normalized(hessian.diagonal().unflatten(0, (-1, 64)))
scale, shift = _fit_cpu(weight, importance, torch.arange(8.0)[None], True, codec_named("native:affine-3-g64").offset)
scales = torch.rand(5, 16, generator=draw).cumsum(1)
errors, subs = _best_subs_cpu(weight[:, :64].contiguous(), importance[0], scales, 4)
settings = Recipe("none", "native:table-3", solver="exact").solver_settings
exact = solve_linear("any", weight, hessian, "native:table-3", settings)
for array in (scale.numpy(), shift.numpy(), errors.numpy(), subs.numpy(), *exact.planes.values()):
    print(hashlib.sha256(array.tobytes()).hexdigest())
"""


def test_the_first_run_gives_the_bits_of_later_ones(tmp_path: Path) -> None:
    """A process that has just compiled a function may run another copy of it than a later process.

    The later process takes the function's caller from the cache.
    """
    command = [sys.executable, "-c", SOLVE]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, later = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert list(tmp_path.rglob("*.nbc"))
    assert first == later


def test_no_sum_is_taken_in_an_order_of_the_compilers_choice() -> None:
    """With `fastmath` the order would depend on what is inlined and on how many numbers the processor adds at once."""
    assert [path.name for path in KERNELS.glob("*.py") if "fastmath=" in path.read_text()] == []
