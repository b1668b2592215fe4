"""EXL3's kernels, compared with `formats` and float64. They run on the CPU, and on a GPU by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lqexport.formats.codec import Planes
from lqexport.formats.exl3 import EXL3, signs
from lqexport.formats.trellis import rotated
from lqexport.kernels import cuda, cuda_decode, cuda_exl3, cuda_multiply

KernelsOn = Callable[[str, dict[str, list[str]]], str]
GOLDEN = Path(__file__).parent / "golden" / "exl3"
SHARED = Path(__file__).parent.parent.parent / "shared" / "vectors" / "exl3"
VECTORS = ["k1_mul1", "k2_3inst_legacy_su_sv", "k2_mul1_nonsquare", "quantized_q_4_mul1"]
FURTHER = ["k4_mul1_bias", "k5_3inst", "k6_mul1", "k8_mul1"]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FEW = ["decode_exl3<Mul1, float>", "multiply_exl3<Mul1, 1>", "multiply_exl3<Mul1, 8>", "rotate_inputs<float>",
       "rotate_outputs<float>"]  # fmt: skip
"""The kernels that the builds with sanitizers have."""
HADAMARD = rotated(np.eye(128, dtype=np.float32)).astype(np.float64)


def random_planes(name: str, rows: int, columns: int) -> Planes:
    draw = np.random.default_rng(rows * 1000 + columns)
    shape = EXL3[name].layout(rows, columns)["trellis"][1]
    return {
        "trellis": draw.integers(-(2**15), 2**15, shape).astype(np.int16),
        "suh": (draw.normal(size=columns) * 0.02).astype(np.float16),
        "svh": draw.normal(size=rows).astype(np.float16),
    }


def on(device: str, planes: Planes) -> dict[str, torch.Tensor]:
    return {plane: torch.from_numpy(array.copy()).to(device) for plane, array in planes.items()}


def check_decode(name: str, planes: Planes, device: str, dtype: torch.dtype = torch.float32) -> None:
    columns = len(planes["suh"])
    expected = torch.from_numpy(EXL3[name].decode(planes, columns)).to(dtype)
    actual = cuda_decode.decode(name, on(device, planes), columns, dtype).cpu()
    number, bits = ~expected.isnan(), torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(actual.isnan(), ~number)
    assert torch.equal(actual[number].view(bits), expected[number].view(bits))


def in_runs(matrix: np.ndarray) -> np.ndarray:
    """Returns a float64 matrix whose rows are padded to runs of 128 and rotated."""
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 128)))
    return (padded.reshape(len(matrix), -1, 128) @ HADAMARD).reshape(len(matrix), -1)


def product(name: str, planes: Planes, x: torch.Tensor) -> torch.Tensor:
    """Returns x W^T in float64, without roundings within W."""
    walks = EXL3[name].unpack(planes, len(planes["suh"]))
    sums = in_runs(x.double().numpy() * walks.inputs.astype(np.float64)) @ walks.codes().astype(np.float64)
    return torch.from_numpy(in_runs(sums)[:, : len(walks.outputs)] * walks.outputs.astype(np.float64))


def check_product(
    name: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: str, rank: int | None = None
) -> None:
    planes, generator = random_planes(name, *shape), torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    expected, low_rank = product(name, planes, x), None
    if rank is not None:
        left = torch.randn(shape[0], rank, generator=generator).half()
        right = torch.randn(rank, shape[1], generator=generator).half() * 0.1
        low_rank = cuda_multiply.LowRank(left.to(device), right.to(device))
        expected = expected + x.double() @ right.double().T @ left.double().T
    y = cuda_multiply.multiply(x.to(device), name, on(device, planes), low_rank).cpu()
    assert y.dtype == dtype
    assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.fixture(params=["plain", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, kernels_on: KernelsOn) -> str:
    return kernels_on(request.param, {cuda_exl3.SOURCE: cuda_exl3.kernels()})


@pytest.mark.parametrize("vector", VECTORS + FURTHER)
def test_layers_of_exllamav3(vector: str, device: str) -> None:
    """Both kernels, on layers and outputs that ExLlamaV3's own kernels made."""
    path = (GOLDEN if vector in VECTORS else SHARED) / f"{vector}.safetensors"
    if not path.is_file():
        pytest.skip("the vector is in ../shared only, which is not there")
    content = {key.rpartition(".")[2]: array for key, array in load_file(path).items()}
    planes = {"trellis": content["trellis"]}
    for scale, bits in (("suh", "su"), ("svh", "sv")):
        planes[scale] = signs(content[bits]) if bits in content else content[scale]
    name = f"exl3:{planes['trellis'].shape[2] // 16}{'' if 'mul1' in content else '-3inst'}"
    check_decode(name, planes, device)
    y = cuda_multiply.multiply(torch.from_numpy(content["x"]).to(device), name, on(device, planes)).cpu().float()
    expected = torch.from_numpy(content["y"]).float() - torch.from_numpy(content.get("bias", np.float16([0]))).float()
    assert float((y - expected).norm() / expected.norm()) < 6e-4


@pytest.mark.parametrize("name", EXL3)
def test_random_bits(name: str, device: str) -> None:
    check_decode(name, random_planes(name, 130, 129), device)
    check_product(name, (130, 129), 1, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_float32(dtype: torch.dtype, device: str) -> None:
    for columns in (100, 101):
        check_decode("exl3:3", random_planes("exl3:3", 5, columns), device, dtype)


def test_extreme_scales(device: str) -> None:
    """Some products become infinite, and sums of those no numbers; others are subnormal in float16."""
    planes = random_planes("exl3:2-mcg", 256, 256)
    extremes = np.array([0.0, 2.0**-24, -1.5, 65504.0, -0.0, 6e-6], np.float16)
    for suh, svh in ((np.resize(extremes, 256), planes["svh"]), (planes["suh"], np.resize(extremes, 256))):
        check_decode("exl3:2-mcg", planes | {"suh": suh, "svh": svh}, device)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_products(dtype: torch.dtype, device: str) -> None:
    """Covers one tile of tokens, more than one, and two; more and fewer tiles of inputs than warps; odd sides."""
    for tokens, shape in [(1, (128, 384)), (8, (2, 128)), (9, (130, 7)), (16, (128, 128))]:
        check_product("exl3:3.5", shape, tokens, dtype, device)


def test_the_low_rank_correction_is_added(device: str) -> None:
    for tokens in (1, 10, 20):
        check_product("exl3:7", (40, 129), tokens, torch.float32 if tokens < 17 else torch.bfloat16, device, rank=5)


def test_a_product_of_many_tokens_is_that_of_the_decoded_weights(device: str) -> None:
    """That of few tokens differs by the roundings within the matrix."""
    planes, x = random_planes("exl3:4", 130, 128), torch.randn(17, 128, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ torch.from_numpy(EXL3["exl3:4"].decode(planes, 128)).double().T
    for part, limit in ((x, 2e-6), (x[:9], 6e-4)):
        y = cuda_multiply.multiply(part.to(device), "exl3:4", on(device, planes)).cpu()
        assert float((y - exact[: len(part)]).norm() / exact.norm()) < limit


def test_activations_of_any_strides(device: str) -> None:
    planes, x = random_planes("exl3:2", 10, 96), torch.randn(96, 3, generator=torch.Generator().manual_seed(0)).T
    y = cuda_multiply.multiply(x.to(device), "exl3:2", on(device, planes)).cpu()
    torch.testing.assert_close(y.double(), product("exl3:2", planes, x), rtol=1e-4, atol=1e-4)


def test_within_their_memory(kernels_on: KernelsOn) -> None:
    device = kernels_on("address", {cuda_exl3.SOURCE: FEW})
    for name in ("exl3:1", "exl3:3.5", "exl3:8"):
        check_decode(name, random_planes(name, 129, 131), device)
    for tokens in (1, 9):
        check_product("exl3:2.5", (3, 130), tokens, torch.float32, device, rank=2)


def test_no_race(kernels_on: KernelsOn) -> None:
    """Covers what a decoding block rotates twice, and one block of a product: a whole one has eight, of 512 threads."""
    device, planes = kernels_on("thread", {cuda_exl3.SOURCE: FEW}), random_planes("exl3:3", 128, 128)
    check_decode("exl3:3", planes, device)
    rings, x, sums = planes["trellis"][:2, :1].copy(), torch.randn(2, 32), torch.empty(2, 16)
    arguments: list[cuda.Argument] = [torch.from_numpy(rings), 6, 16, 32, x, 2, sums]
    cuda.launch(cuda_exl3.SOURCE, "multiply_exl3<Mul1, 8>", 1, cuda_exl3.MULTIPLY_THREADS, arguments, 4 * 16 * 8 * 16)
    codes = EXL3["exl3:3"].unpack(planes, 128).codes()[:32, :16]
    torch.testing.assert_close(sums, x @ torch.from_numpy(codes), rtol=1e-4, atol=1e-4)


def test_planes_of_another_shape_are_refused() -> None:
    planes = on("cpu", random_planes("exl3:4", 32, 64))
    with pytest.raises(ValueError, match=r"Plane suh of exl3:4 must be float16 \[63\], not \[64\]"):
        cuda_decode.decode("exl3:4", planes, 63)
    with pytest.raises(ValueError, match=r"Plane trellis of exl3:3 must be int16 \[8, 8, 48\], not \[8, 8, 64\]"):
        cuda_multiply.multiply(torch.zeros(1, 64), "exl3:3", planes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["exl3:2.5", "exl3:4", "exl3:8", "exl3:3-mcg", "exl3:6-3inst"])
def test_a_large_matrix_on_a_gpu(name: str, kernels_on: KernelsOn) -> None:
    device = kernels_on("gpu", {})
    for dtype in TOLERANCE:
        check_decode(name, random_planes(name, 4000, 4096), device, dtype)
        for tokens in (1, 7, 16):
            check_product(name, (4000, 4096), tokens, dtype, device, rank=16)
