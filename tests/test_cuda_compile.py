"""NVRTC compiles every kernel for every architecture with CuPy's options: no spills, and registers within limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lqexport.kernels import (
    cuda,
    cuda_decode,
    cuda_exl2,
    cuda_exl3,
    cuda_kmeans,
    cuda_multiply,
    cuda_solve,
    cuda_squared,
    cuda_trellis,
    cuda_vectors,
)

KERNELS = {
    cuda_decode.SOURCE: cuda_decode.kernels(),
    cuda_multiply.SOURCE: cuda_multiply.kernels(),
    cuda_exl2.SOURCE: cuda_exl2.kernels(),
    cuda_exl3.SOURCE: cuda_exl3.kernels(),
    cuda_kmeans.SOURCE: [cuda_kmeans.KERNEL],
    cuda_squared.SOURCE: [cuda_squared.KERNEL],
    cuda_trellis.SOURCE: [cuda_trellis.KERNEL],
    cuda_vectors.SOURCE: cuda_vectors.KERNELS,
    **cuda_solve.KERNELS,
}
REGISTERS = {
    "decode.cu": 40,
    "multiply.cu": 120,
    "exl2.cu": 64,
    "exl3.cu": 128,
    "feedback.cu": 64,
    "refine.cu": 96,
    "fit.cu": 72,
    "kmeans.cu": 80,
    "squared.cu": 48,
    "trellis.cu": 64,
    "vectors.cu": 120,
}
"""Source file -> most registers per thread of its kernels. With these, at least five warps fit on each of an SM's four
schedulers; four of `vectors.cu`, whose descent has both the search of a codebook and the refit, of products with
vectors for sm_120, and of `exl3.cu`, whose decoding has 64 weights of a lane in registers."""
ARCHITECTURES = (70, 75, 80, 86, 89, 90, 120)
WHOLE = (70, 90, 120)
"""Architectures that all products are compiled for. For the others, only the product with the most registers of each
format is compiled, and for formats with a codebook this one alone for the first and the last. EXL3's kernels are
compiled for one architecture each, in turn, since decoding takes the compiler half a second."""


def kernels(source: str, architecture: int) -> list[str]:
    if source == cuda_exl3.SOURCE:
        return KERNELS[source][ARCHITECTURES.index(architecture) :: len(ARCHITECTURES)]
    if source != cuda_multiply.SOURCE:
        return KERNELS[source]
    largest = [kernel for kernel in KERNELS[source] if kernel.endswith(f", float, {cuda_multiply.TILES[-1]}>")]
    vectors = [kernel for kernel in largest if "<Vectors<" in kernel] if architecture in (70, 120) else []
    scalar = KERNELS[source] if architecture in WHOLE else largest
    return [*vectors, *(kernel for kernel in scalar if "<Vectors<" not in kernel)]


@pytest.fixture(scope="module")
def nvrtc(cuda_harness: ModuleType, load_script: Callable[[str], ModuleType]) -> ModuleType:
    module = load_script("tests/cudacpu/nvrtc.py")
    if module.library() is None:
        pytest.skip("nvidia-cuda-nvrtc-cu12 is not installed")
    return module


def options(cuda_harness: ModuleType) -> list[str]:
    return [*cuda.options(), f"-I{cuda_harness.headers()}"]


def test_every_source_is_compiled() -> None:
    assert sorted(KERNELS) == sorted(path.name for path in cuda.FOLDER.glob("*.cu")) == sorted(REGISTERS)


def test_shared_memory_is_had_by_the_macro_alone_and_nothing_is_written_in_ptx() -> None:
    """The macro is in common.cuh. Code in PTX could not be tested on the host, except by another version of it."""
    assert [path.name for path in cuda.FOLDER.glob("*.cu*") if re.search(r"\basm\b", path.read_text())] == []
    uses = [path.name for path in cuda.FOLDER.glob("*.cu*") for _ in re.findall("__shared__", path.read_text())]
    assert uses == ["common.cuh"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_compiles_without_spills(source: str, architecture: int, nvrtc: ModuleType, cuda_harness: ModuleType) -> None:
    wanted = kernels(source, architecture)
    usages = nvrtc.compile_kernels(cuda.FOLDER / source, wanted, architecture, options(cuda_harness))
    assert sorted(usage.kernel for usage in usages) == sorted(wanted) != []
    assert [usage for usage in usages if usage.spills or usage.stack] == []
    assert [usage for usage in usages if usage.registers > REGISTERS[source]] == []


def test_a_spill_would_be_seen(nvrtc: ModuleType, cuda_harness: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text("""
__global__ void __launch_bounds__(1024) spills(float* x, int n) {
  float many[90];
  for (int k = 0; k < 90; k++) many[k] = x[k * n];
  for (int i = 0; i < n; i++)
#pragma unroll
    for (int k = 0; k < 90; k++) many[k] = many[k] * many[(k + 1) % 90] + x[i];
  for (int k = 0; k < 90; k++) x[k * n] = many[k];
}""")
    (usage,) = nvrtc.compile_kernels(source, ["spills"], 80, options(cuda_harness))
    assert usage.registers == 64
    assert usage.spills > 0


def test_nvrtcs_words_are_passed_on(nvrtc: ModuleType, cuda_harness: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong(float* x) { x[0] = absent; }")
    with pytest.raises(RuntimeError, match="absent"):
        nvrtc.compile_kernels(source, ["wrong"], 80, options(cuda_harness))


def test_the_counts_in_the_docs_are_those_of_the_bench(
    root: Path,
    load_script: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks the table of bytes and operations. The other table depends on NVRTC's version."""
    bench = load_script("bench/kernels.py")
    used = ModuleType("usage")
    used.registers = 32  # type: ignore[attr-defined]
    monkeypatch.setattr(bench, "usage", lambda work, architecture: used)
    bench.count()
    counted, _ = capsys.readouterr().out.split("\n\n")
    assert counted.strip() in (root / "docs" / "kernels.md").read_text()


def test_occupancy(load_script: Callable[[str], ModuleType]) -> None:
    """Compared with NVIDIA's occupancy calculator: limits by threads, blocks, and registers in 256s per warp."""
    bench = load_script("bench/kernels.py")
    ada, hopper = bench.GPUS
    assert bench.occupancy(ada, 32, 256) == 48
    assert bench.occupancy(hopper, 16, 32) == 32
    assert bench.occupancy(ada, 88, 128) == 20
    assert bench.occupancy(hopper, 255, 128) == 8
