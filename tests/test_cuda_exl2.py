"""EXL2's kernels, compared with `formats` and float64. They run on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lqexport.formats.codec import Planes
from lqexport.formats.exl2 import BITS, Exl2, of_planes, runs_named
from lqexport.kernels import cuda_decode, cuda_exl2, cuda_multiply

KernelsOn = Callable[[str, dict[str, list[str]]], str]
VECTORS = sorted((Path(__file__).parent / "golden" / "exl2").glob("*.safetensors"))
MIX = "exl2:8g32x1+6g64x2+5g32x2+4g128x1+3g96x1+2g32x3"
NAMES = [*(f"exl2:{bits}g32x3" for bits in BITS), "exl2:5g96x2", MIX]
MAXIMA = np.array([0.0, 2.0**-24, 6e-6, 0.003, 0.02, 1.0, 255.9, 65504.0, -0.02, -0.0], np.float16)
"""With 255.9 and more, some weights become infinite, as in ExLlamaV2. Below 2^-6 the scales are subnormal."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random_planes(name: str, rows: int, maxima: np.ndarray) -> Planes:
    """Returns planes with random codes, scale codes and order of columns."""
    codec, draw = Exl2(runs_named(name)), np.random.default_rng(rows)
    layout = codec.layout(rows, codec.columns)
    words = {
        plane: draw.integers(0, 256, np.prod(layout[plane][1]) * 4, dtype=np.uint8).view(np.int32)
        for plane in ("q_weight", "q_scale")
    }
    bits = np.repeat([run.bits for run in codec.runs], [run.count for run in codec.runs])
    lines = np.repeat([run.group * run.bits // 32 for run in codec.runs], [run.count for run in codec.runs])
    return {
        **{plane: array.reshape(layout[plane][1]) for plane, array in words.items()},
        "q_scale_max": np.resize(maxima, codec.groups),
        "q_groups": np.stack([bits, np.cumsum(lines) - lines], axis=1).astype(np.int16).ravel(),
        "q_invperm": draw.permutation(codec.columns).astype(np.int32),
    }


def on(device: str, planes: Planes) -> dict[str, torch.Tensor]:
    return {plane: torch.from_numpy(array.copy()).to(device) for plane, array in planes.items()}


def check_decode(planes: Planes, device: str, dtype: torch.dtype = torch.float32) -> None:
    codec, columns = of_planes(planes), len(planes["q_invperm"])
    with np.errstate(over="ignore"):  # the largest maxima overflow
        expected = torch.from_numpy(codec.decode(planes, columns)).to(dtype)
    actual = cuda_decode.decode(codec.name, on(device, planes), columns, dtype).cpu()
    number, bits = ~expected.isnan(), torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(actual.isnan(), ~number)
    assert torch.equal(actual[number].view(bits), expected[number].view(bits))


def check_product(planes: Planes, tokens: int, dtype: torch.dtype, device: str, rank: int | None = None) -> None:
    codec, columns = of_planes(planes), len(planes["q_invperm"])
    weights = torch.from_numpy(codec.decode(planes, columns)).double()
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    low_rank = None
    if rank is not None:
        left = torch.randn(len(weights), rank, generator=generator).half()
        right = torch.randn(rank, columns, generator=generator).half() * 0.1
        low_rank = cuda_multiply.LowRank(left.to(device), right.to(device))
        weights = weights + left.double() @ right.double()
    y = cuda_multiply.multiply(x.to(device), codec.name, on(device, planes), low_rank).cpu()
    expected = x.double() @ weights.T
    assert y.dtype == dtype
    assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.fixture(params=["plain", "address", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, {cuda_exl2.SOURCE: cuda_exl2.kernels()})


@pytest.fixture(params=["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def plain_device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, {cuda_exl2.SOURCE: cuda_exl2.kernels()})


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_layers_that_exllamav2_decoded(path: Path, plain_device: str) -> None:
    """Our kernel gives the bits of ExLlamaV2's kernel."""
    content = load_file(path)
    expected = torch.from_numpy(np.ascontiguousarray(content.pop("expected").T))
    planes = {name.removeprefix("layer."): plane for name, plane in content.items() if "bias" not in name}
    actual = cuda_decode.decode(of_planes(planes).name, on(plain_device, planes), expected.shape[1], torch.float16)
    assert torch.equal(actual.cpu().view(torch.int16), expected.view(torch.int16))
    check_decode(planes, plain_device)


@pytest.mark.parametrize("name", NAMES)
def test_random_bytes(name: str, plain_device: str) -> None:
    for rows in (32, 96):
        check_decode(random_planes(name, rows, MAXIMA[3:6]), plain_device)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_extreme_maxima(dtype: torch.dtype, device: str) -> None:
    for shift in range(0, len(MAXIMA), 3):
        check_decode(random_planes(MIX, 32, np.roll(MAXIMA, shift)), device, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", NAMES)
def test_products(name: str, dtype: torch.dtype, plain_device: str) -> None:
    """Covers one token, one tile, more than one, and two tiles; and more and fewer units than warps."""
    for tokens, rows in [(1, 64), (8, 32), (9, 32), (16, 64)]:
        check_product(random_planes(name, rows, MAXIMA[3:6]), tokens, dtype, plain_device)


def test_products_of_wide_matrices(plain_device: str) -> None:
    check_product(random_planes("exl2:6g128x3+3g32x20", 64, MAXIMA[3:5]), 3, torch.float32, plain_device)


def test_the_low_rank_correction_is_added(plain_device: str) -> None:
    for tokens in (1, 10):
        check_product(random_planes(MIX, 32, MAXIMA[3:5]), tokens, torch.float32, plain_device, rank=5)


def test_many_tokens_are_decoded_first(plain_device: str) -> None:
    check_product(random_planes("exl2:4g32x2", 32, MAXIMA[3:5]), 17, torch.float32, plain_device)


def test_products_within_their_memory(device: str) -> None:
    for tokens in (1, 9):
        check_product(random_planes(MIX, 32, MAXIMA[3:5]), tokens, torch.float16, device, rank=2)


def test_no_race(kernels_on: KernelsOn) -> None:
    """Covers the tile that a decoding block transposes, and the sums that the warps of a product share."""
    device = kernels_on("thread", {cuda_exl2.SOURCE: cuda_exl2.kernels()})
    planes = random_planes("exl2:5g32x1", 32, MAXIMA[3:5])
    check_decode(planes, device)
    check_product(planes, 3, torch.float32, device)


def test_activations_of_any_strides(plain_device: str) -> None:
    planes = random_planes("exl2:4g32x2", 32, MAXIMA[3:5])
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).T
    y = cuda_multiply.multiply(x.to(plain_device), "exl2:4g32x2", on(plain_device, planes)).cpu()
    weights = of_planes(planes).decode(planes, 64)
    torch.testing.assert_close(y, x @ torch.from_numpy(weights).T, rtol=1e-4, atol=1e-4)


def test_planes_of_another_shape_are_refused() -> None:
    planes = on("cpu", random_planes("exl2:4g32x2", 32, MAXIMA))
    with pytest.raises(ValueError, match=r"holds 64 columns, not 32"):
        cuda_decode.decode("exl2:4g32x2", planes, 32)
    with pytest.raises(ValueError, match=r"Plane q_scale of exl2:4g32x2 must be int32 \[2, 4\]"):
        cuda_decode.decode("exl2:4g32x2", planes | {"q_scale": planes["q_scale"][:1]}, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_large_matrix_on_a_gpu(dtype: torch.dtype, kernels_on: KernelsOn) -> None:
    device = kernels_on("gpu", {})
    planes = random_planes("exl2:6g32x32+5g32x32+4g32x32+2g32x32", 4096, MAXIMA[3:5])
    check_decode(planes, device, dtype)
    for tokens in (1, 7, 16):
        check_product(planes, tokens, dtype, device, rank=16)
