"""Wrong tensors are named by their weights alone, and errors that quantizers leave are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit, minmax
from lqexport.verification.deviation import deviation

SOURCE = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))


def rounded(weights: Tensor, name: str = "gguf:Q4_0", fitted: bool = False) -> Tensor:
    codec = codec_named(name)
    grid = fit(codec, weights, torch.ones(weights.shape[1])) if fitted else minmax(codec, weights)
    return grid.values(grid.nearest(weights))


def with_rows(change: Callable[[Tensor], Tensor], row: slice) -> Tensor:
    values = rounded(SOURCE, fitted=True)
    values[row] = change(values[row])
    return values


def test_rounding_is_no_deviation() -> None:
    for name in ("gguf:Q8_0", "gguf:Q4_0", "gguf:Q4_K", "gguf:Q2_K"):
        nearest = rounded(SOURCE, name)
        assert deviation(nearest, nearest, SOURCE) is None
        assert deviation(rounded(SOURCE, name, fitted=True), nearest, SOURCE) is None


def test_zeros_where_another_quantizer_rounds_up_are_no_deviation() -> None:
    """With three levels and a scale for 256 weights, a run of 32 may have one weight that is not 0."""
    nearest = rounded(SOURCE, "gguf:TQ2_0")
    other, runs = nearest.clone(), (nearest != 0).unflatten(1, (-1, 32))
    alone = runs & (runs.sum(2, keepdim=True) == 1)
    border = alone.flatten(1) & (SOURCE.abs() < 0.52 * SOURCE.abs().amax(1, keepdim=True))
    assert int(border.sum()) > 3
    other[border] = 0
    assert deviation(other, nearest, SOURCE) is None


def test_a_few_blocks_that_another_quantizer_rounds_otherwise_are_none() -> None:
    nearest = rounded(SOURCE)
    other = nearest.clone()
    step = (nearest[5, :32].unique().diff()).min()
    other[5, 3] += step if SOURCE[5, 3] > nearest[5, 3] else -step
    assert deviation(other, nearest, SOURCE) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (rounded(1.02 * SOURCE), "is 1.02 times the source's"),
        (0 * SOURCE, "is 0 times the source's"),
        (rounded(1.2 * SOURCE, fitted=True), "is about 1.19 times as large as the source's"),
        (with_rows(lambda rows: 0 * rows, slice(3, 4)), "has 8 of 1024 blocks of another size than the source's"),
        (with_rows(lambda rows: rows + rows.roll(16, 1), slice(3, 5)), "has 2 of 128 rows that are not the source's"),
    ],
)
def test_wrong_tensors(values: Tensor, said: str) -> None:
    assert said in str(deviation(values, rounded(SOURCE), SOURCE))
