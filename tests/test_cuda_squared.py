"""The search for EXL2's scale codes, compared with `kernels.squared`: on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lqexport.formats.exl2 import BITS
from lqexport.grids import fit_sections
from lqexport.kernels import cuda, cuda_squared

KernelsOn = Callable[[str, dict[str, list[str]]], str]


@pytest.fixture(params=["plain", "address", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, {cuda_squared.SOURCE: [cuda_squared.KERNEL]})


@pytest.mark.parametrize("bits", BITS)
def test_errors_and_codes_are_those_of_the_cpu(bits: int, device: str) -> None:
    """Covers rows of zeros, tiny and large numbers, a maximum of zero, and a group that fills no block of threads."""
    draw = torch.Generator().manual_seed(bits)
    group = torch.randn(37, 96, generator=draw) * torch.rand(37, 1, generator=draw)
    group[3], group[5], group[7] = 0, group[5] * 1e-6, group[7] * 50
    weight = fit_sections.normalized(torch.rand(96, generator=draw).pow(2))
    maxima = fit_sections.storable(torch.tensor([0.0, 1e-7, 0.1, 0.5, 2.0]) / 2 ** (bits - 1), bits)
    scales = fit_sections.squared_scale(maxima[:, None], torch.arange(16))
    expected, codes = fit_sections._best_subs_cpu(group, weight, scales, bits)
    errors, device_codes = (
        part.cpu()
        for part in fit_sections._best_subs_cuda(group.to(device), weight.to(device), scales.to(device), bits)
    )
    torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-12)
    assert float((device_codes != codes).float().mean()) < 0.02  # ties, which the order of a sum decides


def test_a_grid_is_fitted_as_well(kernels_on: KernelsOn, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_on("plain", {cuda_squared.SOURCE: [cuda_squared.KERNEL]})
    draw = torch.Generator().manual_seed(1)
    group, weight = torch.randn(32, 64, generator=draw), torch.ones(64) / 64
    base = fit_sections._base(group[:, None], 3).amax()
    expected, codes = fit_sections._fit_group(group, weight, 3, base)
    monkeypatch.setattr(fit_sections, "_best_subs_cpu", fit_sections._best_subs_cuda)
    monkeypatch.setattr(cuda, "usable", lambda _: True)
    maximum, device_codes = fit_sections._fit_group(group, weight, 3, base)
    assert maximum == expected
    assert torch.equal(device_codes, codes)
