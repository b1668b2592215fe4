"""The kernel that searches EXL3's walks, compared with `kernels.trellis`. It runs on the CPU, and on a GPU by
`pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lqexport.formats.exl3 import EXL3
from lqexport.kernels import cuda, cuda_trellis, trellis
from lqexport.solver import solve_trellis
from lqexport.solver.solve_trellis import Encoder

KernelsOn = Callable[[str, dict[str, list[str]]], str]
BUILD = {cuda_trellis.SOURCE: [cuda_trellis.KERNEL]}


def check(name: str, count: int, device: str, begin: int = 0, again: bool = False) -> None:
    """Checks that both searches find the same walks for some tiles."""
    codec_trellis, draw = EXL3[name].trellis, np.random.default_rng(4)
    form = trellis.form_of(codec_trellis.table, codec_trellis.new_bits)
    targets = draw.normal(0, 0.9, (count, 256)).astype(np.float32)
    weights = draw.uniform(0.4, 1, 256).astype(np.float32)
    rings = draw.integers(-(2**15), 2**15, (count, codec_trellis.words)).astype(np.int16)
    expected, actual = codec_trellis.unpack(rings), codec_trellis.unpack(rings)
    trellis.search(targets, weights, form, begin, again, trellis.rooms_for(form, 1), expected)
    on_device = (torch.from_numpy(array).to(device) for array in (targets, weights))
    cuda_trellis.search(*on_device, form, begin, again, actual)
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("build", ["address", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_walks_that_are_closed_where_they_were_are_those_of_the_cpu(build: str, kernels_on: KernelsOn) -> None:
    """A search is 17 million steps at least, which are too many for the build that finds races."""
    check("exl3:8", 1, kernels_on(build, BUILD), begin=128, again=True)


@pytest.mark.parametrize("name", ["exl3:2", "exl3:3.5"])
@pytest.mark.parametrize("build", ["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_walks_are_those_of_the_cpu(
    name: str, build: str, kernels_on: KernelsOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for one tile, so that a block searches both tiles."""
    monkeypatch.setattr(cuda_trellis, "ROOM", 1)
    check(name, 2, kernels_on(build, BUILD))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exl3:1", "exl3:3", "exl3:4", "exl3:6"])
def test_many_tiles_on_a_gpu(name: str, kernels_on: KernelsOn) -> None:
    check(name, 300, kernels_on("gpu", {}))


def test_the_encoder_searches_where_the_target_is(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[torch.Tensor] = []

    def recorded(targets: torch.Tensor, weights: torch.Tensor, *rest: object) -> None:
        launches.extend((targets, weights))

    monkeypatch.setattr(cuda, "usable", lambda _: True)
    monkeypatch.setattr(solve_trellis.cuda_trellis, "search", recorded)
    target = torch.arange(16.0 * 32).view(16, 32) / 256  # within the codebook
    states = np.zeros((2, 256), np.uint16)
    Encoder(EXL3["exl3:8"].trellis).nearest(target, torch.arange(16.0) + 1, states)
    assert torch.equal(launches[0][1, :9], target[[0, 1, 8, 9, 0, 1, 8, 9, 2], [16] * 4 + [24] * 4 + [16]])
    assert launches[1][:9].tolist() == [1, 2, 9, 10, 1, 2, 9, 10, 3]
