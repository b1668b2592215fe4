"""The decode kernels give the bits of `formats`. They run on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lqexport.formats.codec import GridCodec, Planes
from lqexport.formats.mxint import BIAS, HIGHEST, LOWEST
from lqexport.formats.native import pack_bits
from lqexport.formats.registry import codec_named, names
from lqexport.kernels import cuda, cuda_decode

EXTREMES = np.array([0.0, 2.0**-24, -1.5, 65504.0, -0.0, -(2.0**-24), -65504.0], dtype=np.float16)

EXPONENTS = np.array([2, 3, 127, 252], dtype=np.uint8)
"""Exponents of MXFP4: the two least of normal numbers, that of 1/2, and the largest. GPUs make subnormal numbers 0."""


def shapes(name: str) -> list[tuple[int, int]]:
    """Returns shapes [rows, columns]: one block or several; without blocks, tails of fewer than eight columns too."""
    block = codec_named(name).block
    return [(3, block), (5, 3 * block)] if block > 1 else [(3, 1), (2, 13), (5, 264)]


def random_planes(name: str, rows: int, columns: int) -> Planes:
    """Returns random planes with every code, sub-scale and sign. Their float16 members are made finite."""
    rng = np.random.default_rng(rows * 1000 + columns)
    layout = codec_named(name).layout(rows, columns)
    planes = {
        plane: rng.integers(0, 256, np.prod(shape) * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(shape)
        for plane, (dtype, shape) in layout.items()
    }
    if "exponents" in planes:  # MXINT does not allow every code and exponent
        bits = codec_named(name).bits
        codes = rng.integers(0, codec_named(name).level_count, (rows, columns), dtype=np.uint8)
        exponents = rng.integers(BIAS + LOWEST, BIAS + HIGHEST + 1, planes["exponents"].shape, dtype=np.int16)
        planes = {"codes": pack_bits(codes, bits), "exponents": (exponents + bits - 1).astype(np.uint8)}
    return {plane: finite(name, array) for plane, array in planes.items()}


def finite(name: str, array: np.ndarray) -> np.ndarray:
    members = getattr(codec_named(name), "members", None)
    if array.dtype == np.float16:
        return tame(array)
    if array.dtype == np.float32:  # a number for the whole matrix
        return np.full_like(array, 1 / 3)
    if members is None:
        return array
    blocks = array.view(members)
    for member in codec_named(name).supers:
        if blocks[member].dtype == np.float16:
            blocks[member] = tame(blocks[member])
    return array


def tame(halves: np.ndarray) -> np.ndarray:
    """Makes infinities and NaNs finite: their exponent loses a bit."""
    bits = np.ascontiguousarray(halves).view(np.uint16)
    return np.where(np.isfinite(halves), bits, bits & 0xBFFF).astype(np.uint16).view(np.float16).reshape(halves.shape)


def with_extreme_scales(name: str) -> Planes:
    """Returns planes whose float16 members are zeros, subnormals, negative numbers and the largest, in turn."""
    rows, columns = shapes(name)[-1]
    planes = random_planes(name, rows, columns)
    for plane, array in planes.items():
        if array.dtype == np.float16:
            array[...] = np.resize(EXTREMES, array.shape)
        elif hasattr(codec_named(name), "members"):
            blocks = planes[plane].view(codec_named(name).members)
            for shift, member in enumerate(codec_named(name).supers):
                extremes = EXTREMES if blocks[member].dtype == np.float16 else EXPONENTS
                blocks[member] = np.resize(np.roll(extremes, shift), blocks[member].shape)
    return planes


def check(name: str, planes: Planes, columns: int, device: str, dtype: torch.dtype = torch.float32) -> None:
    expected = torch.from_numpy(codec_named(name).decode(planes, columns)).to(dtype)
    tensors = {plane: torch.from_numpy(array.copy()).to(device) for plane, array in planes.items()}
    actual = cuda_decode.decode(name, tensors, columns, dtype).cpu()
    assert actual.dtype == dtype
    number = ~expected.isnan()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(actual.isnan(), ~number)
    assert torch.equal(actual[number].view(bits), expected[number].view(bits))


@pytest.fixture(params=["plain", "address", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: Callable[[str, dict[str, list[str]]], str]) -> str:
    """The device of the tensors; kernels run in one of the harness's builds or on a GPU."""
    return kernels_on(request.param, {cuda_decode.SOURCE: cuda_decode.kernels()})


@pytest.mark.parametrize("name", [*cuda_decode.READERS, *cuda_decode.SCALED])
def test_random_bytes(name: str, device: str) -> None:
    for rows, columns in shapes(name):
        check(name, random_planes(name, rows, columns), columns, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*cuda_decode.READERS, *cuda_decode.SCALED])
def test_half_precision_is_the_rounded_float32(name: str, dtype: torch.dtype, device: str) -> None:
    rows, columns = shapes(name)[-1]
    check(name, random_planes(name, rows, columns), columns, device, dtype)


@pytest.mark.parametrize("name", [name for name in cuda_decode.READERS if isinstance(codec_named(name), GridCodec)])
def test_extreme_scales(name: str, device: str) -> None:
    check(name, with_extreme_scales(name), shapes(name)[-1][1], device)


def test_every_half_and_every_bfloat16(device: str) -> None:
    """All 65536 values of each type keep their bits, even subnormals, which flushing arithmetic would change."""
    blocks = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(1, -1)
    for name in ("gguf:F16", "gguf:BF16"):
        check(name, {"blocks": blocks}, 65536, device)
        check(name, {"blocks": blocks}, 65536, device, torch.bfloat16)


def test_float32_to_halves_rounds_to_even(device: str) -> None:
    """Covers float32 numbers around every float16 and bfloat16, and subnormal ones."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    bits = middles.view(torch.int32)
    near = torch.cat([bits - 1, bits, bits + 1, torch.arange(0, 0x7F800000, 32749, dtype=torch.int32)])
    near = near[: len(near) // 8 * 8]
    planes = {"blocks": near.numpy().view(np.uint8).reshape(1, -1)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check("gguf:F32", planes, len(near), device, dtype)


def test_rows_of_a_wide_matrix(device: str) -> None:
    """The matrix has more rows and columns than one block of threads decodes."""
    check("gguf:Q4_K", random_planes("gguf:Q4_K", 65, 1024), 1024, device)


def test_planes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="Plane blocks of gguf:Q4_0 must be uint8"):
        cuda_decode.decode("gguf:Q4_0", {"blocks": torch.zeros(2, 17, dtype=torch.uint8)}, 32)


def test_without_kernels_there_is_one_clear_sentence() -> None:
    if cuda.missing() is None:
        pytest.skip("the kernels can run here")
    with pytest.raises(cuda.KernelsMissingError, match=r"^CuPy .*\.$"):
        cuda_decode.decode("gguf:Q4_0", {"blocks": torch.zeros(1, 18, dtype=torch.uint8)}, 32)


UNREAD = ["gguf-decay:F32", "gguf-whole:I32", *cuda_decode.SCALED, *names("mlx")]
READ = [name for name in names() if name not in UNREAD]


@pytest.mark.parametrize("name", READ)
def test_every_format_has_a_reader(name: str) -> None:
    """EXL2 and EXL3 have tests of their own. The CPU decodes decays, which are vectors of some tens of weights, tables
    of whole numbers, and MLX's formats, whose runtime is Apple's."""
    assert set(cuda_decode.READERS[name].planes) == set(codec_named(name).layout(1, codec_named(name).block))


def test_a_format_file_lists_each_reader(root: Path) -> None:
    text = (root / "kernels" / "formats.cuh").read_text()
    for reader in cuda_decode.READERS.values():
        inner = reader.type.removeprefix("Blocks<").removeprefix("Vectors<").split("<")[0].rstrip(">")
        assert f"struct {inner}" in text


def test_no_race(kernels_on: Callable[[str, dict[str, list[str]]], str]) -> None:
    names = ["gguf:Q4_0", "gguf:Q6_K", "native:table-3", "native:affine-5-g32"]
    kernels = [f"decode<{cuda_decode.READERS[name].type}, float>" for name in names]
    device = kernels_on("thread", {cuda_decode.SOURCE: kernels})
    for name in names:
        rows, columns = 9, 256
        check(name, random_planes(name, rows, columns), columns, device)
