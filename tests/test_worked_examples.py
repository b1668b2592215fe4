"""Computes the worked examples of docs/solver.md again, from the numbers that the page shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lqexport.calibration.asymmetric import CrossMoments, Entering
from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import STRETCHES, store
from lqexport.grids.grid import TensorGrid, round_half, shared_levels
from lqexport.grids.sections import SquaredSection, squared_scale, storable
from lqexport.kernels.squared import best_subs
from lqexport.runtime.placement import all_on_device
from lqexport.solver.cholesky import factorize
from lqexport.solver.feedback import refit_tables

ASSIGNMENT = re.compile(r"^    (\w+) = (.+?)(?: +#.*)?$", re.MULTILINE)
Shown = dict[str, Any]


def shown(root: Path, heading: str) -> Shown:
    """Returns name -> numbers, for the assignments under one heading of the page."""
    page = (root / "docs" / "solver.md").read_text(encoding="utf-8")
    section = page.split(f"### Example: {heading}\n")[1].split("\n#")[0]
    return {name: ast.literal_eval(value) for name, value in ASSIGNMENT.findall(section)}


def matrix(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def same(result: Tensor, expected: Any) -> None:
    """Asserts that the numbers are equal to float32's precision."""
    torch.testing.assert_close(result.float(), matrix(expected), rtol=1e-5, atol=1e-6)


def test_asymmetric_target(root: Path) -> None:
    page = shown(root, "the asymmetric target")
    weight, full, quantized, lag = (matrix(page[name]) for name in ("W", "X", "Y", "D"))
    tokens = torch.ones(full.shape[1])
    moments = CrossMoments(2, "guided", all_on_device(torch.device("cpu")), rows=1)
    for half in (0, 1):
        moments.add(half, Entering(full.T, lag.T), Entering(quantized.T, torch.zeros_like(lag.T)), tokens)
    target, strength = moments.target(weight, factorize(moments.hessian(), 0.0, act_order=True))
    same(target, page["V"])
    assert strength == pytest.approx(page["strength"], abs=1e-6)
    aim = weight @ full + lag
    same(aim, page["aim"])
    same(weight @ quantized, page["W_on_Y"])
    same(target @ quantized, page["V_on_Y"])
    assert float((aim - weight @ quantized).square().sum()) == pytest.approx(2)
    assert float((aim - target @ quantized).square().sum()) == pytest.approx(0.2, abs=1e-5)


def test_refit_of_a_table(root: Path) -> None:
    page = shown(root, "the refit of a table")
    weights, hessian = matrix(page["weights"]), matrix(page["H"])
    codes = torch.tensor(page["codes"], dtype=torch.uint8)
    grid = TensorGrid(3, matrix(page["table"]), False)
    error = grid.values(codes) - weights
    same(((error @ hessian) * error).sum(), page["loss_before"])
    refitted, moved = refit_tables(error @ hessian, hessian, grid, codes)
    assert torch.equal(moved, codes)
    assert refitted.levels.tolist() == page["new_table"]
    error = refitted.values(codes) - weights
    same(((error @ hessian) * error).sum(), page["loss_after"])


def test_exl2_scales(root: Path) -> None:
    page = shown(root, "EXL2's scales")
    weights, bits = matrix(page["weights"]), 3
    maxima = storable(matrix([page["maximum"]]), bits)
    scales = squared_scale(maxima[:, None], torch.arange(16))
    assert maxima.tolist() == [page["M"]]
    assert float(round_half(maxima / 256)) == page["M_over_256"]
    assert float(scales[0, 8]) == page["scale_of_s_8"]
    assert float(scales[0, 15]) == page["scale_of_s_15"]
    errors, subs = np.empty((2, 1), np.float32), np.zeros((2, 1), np.int16)
    even = np.full(4, 0.25, np.float32)
    best_subs(weights.numpy(), even, scales.numpy(), np.float32(-4), np.float32(3), errors, subs)
    assert subs[:, 0].tolist() == page["s"]
    section = SquaredSection(torch.arange(-4.0, 4.0)[None], 4, maxima, torch.from_numpy(subs))
    codes = section.grid().nearest(weights)
    assert (codes.int() - 4).tolist() == page["levels"]
    values = section.grid().values(codes)
    assert values.tolist() == [page["values_of_row_1"], page["values_of_row_2"]]
    assert f"{float(section.smooth().values(codes)[0, 0])!r}" in (root / "docs" / "solver.md").read_text("utf-8")


def test_superblock_of_q4_k(root: Path) -> None:
    page = shown(root, "a superblock of Q4_K")
    codec = codec_named("gguf:Q4_K")
    assert isinstance(codec, GridCodec)
    assert codec.scale is not None
    assert codec.offset is not None
    wanted = matrix([page["scales"]])
    scales, offsets = store(wanted, codec.scale), store(matrix([page["offsets"]]), codec.offset)
    obvious = round_half(wanted.max() / codec.scale.high)
    assert float(obvious) == page["d_obvious"]
    assert len(STRETCHES) == 31
    rounded = obvious * (wanted / obvious).round().clamp(codec.scale.low, codec.scale.high)
    assert float((rounded - wanted).square().sum()) == pytest.approx(page["error_obvious"], rel=1e-3)
    assert float((scales.values() - wanted).square().sum()) == pytest.approx(page["error"], rel=1e-3)
    assert float(scales.supers) == page["d"]
    assert scales.subs.tolist() == [page["integer_scales"]]
    assert float(offsets.supers) == page["dmin"]
    assert offsets.subs.tolist() == [page["integer_mins"]]
    grid = TensorGrid(256, *shared_levels(codec, wanted.device), scales, offsets)
    codes = torch.zeros(1, 8, 32, dtype=torch.uint8)
    codes[0, 2, :3] = torch.tensor(page["third_codes"])
    assert grid.values(codes.flatten(1))[0, 64:67].tolist() == page["third_values"]
