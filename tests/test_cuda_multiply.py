"""Fused products, compared with float64. They run on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax
from lqexport.kernels import cuda_decode, cuda_multiply

KernelsOn = Callable[[str, dict[str, list[str]]], str]
FEW = ["gguf:Q4_0", "gguf:Q8_0", "gguf:Q4_K", "gguf:Q6_K", "native:table-3", "native:affine-4-g64",
       "gguf:IQ1_M"]  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest error allowed, relative to the largest output. bfloat16 keeps 8 bits."""


def kernels(names: list[str], scalar_types: tuple[str, ...] = ("float", "__half")) -> dict[str, list[str]]:
    readers = {cuda_decode.READERS[name].type for name in names}
    fitting = [
        kernel
        for kernel in cuda_multiply.kernels()
        if any(
            kernel.startswith(f"multiply<{reader}, {scalar_type}, ")
            for reader in readers
            for scalar_type in scalar_types
        )
    ]
    decoding = [f"decode<{reader}, {scalar_type}>" for reader in sorted(readers) for scalar_type in scalar_types]
    return {cuda_multiply.SOURCE: fitting, cuda_decode.SOURCE: decoding}


def problem(name: str, rows: int, columns: int, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the planes of a random matrix, and its values in float64."""
    codec = codec_named(name)
    assert isinstance(codec, GridCodec)
    weights = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    grid = minmax(codec, weights)
    planes = codec.encode(grid.numpy(), grid.nearest(weights).numpy())
    values = torch.from_numpy(codec.decode(planes, columns)).double()
    return {plane: torch.from_numpy(array).to(device) for plane, array in planes.items()}, values


def check(
    name: str, rows: int, columns: int, tokens: int, dtype: torch.dtype, device: str, rank: int | None = None
) -> None:
    planes, values = problem(name, rows, columns, device)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    low_rank = None
    if rank is not None:
        left = torch.randn(rows, rank, generator=generator).half()
        right = torch.randn(rank, columns, generator=generator).half() * 0.1
        low_rank = cuda_multiply.LowRank(left.to(device), right.to(device))
        values = values + left.double() @ right.double()
    y = cuda_multiply.multiply(x.to(device), name, planes, low_rank).cpu()
    expected = x.double() @ values.T
    assert y.dtype == dtype
    assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.fixture(params=["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, kernels(FEW))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FEW)
def test_products(name: str, dtype: torch.dtype, device: str) -> None:
    """Covers one token, one tile, more than one, two tiles; odd numbers of rows; more columns than a block's stride."""
    for tokens, rows, columns in [(1, 7, 1280), (3, 2, 256), (8, 3, 256), (9, 5, 512), (16, 4, 256)]:
        check(name, rows, columns, tokens, dtype, device)


@pytest.mark.parametrize("rank", [1, 8])
def test_the_low_rank_correction_is_added(rank: int, device: str) -> None:
    for name in ("gguf:Q4_0", "native:table-3"):
        for tokens in (1, 10, 20):
            check(name, 5, 256, tokens, torch.float32, device, rank)


def test_columns_that_are_no_multiple_of_eight(device: str) -> None:
    for columns in (1, 13, 1029):
        check("native:table-3", 3, columns, 2, torch.float16, device)


def test_many_tokens_and_other_formats_are_decoded_first(device: str) -> None:
    check("gguf:Q4_0", 5, 64, 17, torch.float32, device)


def test_a_slice_of_activations(device: str) -> None:
    """The slice begins at an address where 16-byte loads are not allowed."""
    planes, values = problem("gguf:Q4_0", 4, 32, device)
    x = torch.randn(2 * 32 + 1, device=device)[1:].view(2, 32)
    y = cuda_multiply.multiply(x, "gguf:Q4_0", planes).cpu()
    torch.testing.assert_close(y.double(), x.cpu().double() @ values.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flavour", ["address", "thread", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_under_the_sanitizers(flavour: str, kernels_on: KernelsOn) -> None:
    """Covers bfloat16 and odd shapes. The thread sanitizer sees the sums that warps share."""
    names = ["gguf:Q6_K", "native:table-3"]
    device = kernels_on(flavour, kernels(names, ("bf16",)))
    check("gguf:Q6_K", 3, 256, 9, torch.bfloat16, device, rank=3)
    check("native:table-3", 3, 13, 1, torch.bfloat16, device)
    check("native:table-3", 2, 24, 3, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", cuda_multiply.FUSED)
def test_every_fused_kernel_on_a_gpu(name: str, dtype: torch.dtype, kernels_on: KernelsOn) -> None:
    device = kernels_on("gpu", {})
    for tokens in (1, 7, 16):
        check(name, 4099, 4096, tokens, dtype, device, rank=16)
