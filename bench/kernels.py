"""What each CUDA kernel must move and compute, and how long that takes at least: counted, or measured on a GPU.

    python bench/kernels.py count   the tables of docs/kernels.md: needs no GPU, but NVRTC, for registers (extra `test`)
    python bench/kernels.py time    each kernel's time on this machine's GPU beside its floor there: bytes over the
                                    bandwidth that a copy reaches

A matrix of 4096 x 4096 weights throughout.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lqexport.formats.codec import GridCodec, SectionedCodec, nbytes
from lqexport.formats.registry import codec_named
from lqexport.grids import fit, fit_sections
from lqexport.kernels import cuda, cuda_decode, cuda_exl2, cuda_kmeans, cuda_multiply, cuda_solve, cuda_squared
from lqexport.solver import solve_cuda

SIZE = 4096
WEIGHTS = SIZE * SIZE
EXL2 = "exl2:4g128x32"
FORMATS = ("gguf:Q4_0", "gguf:Q4_K", "gguf:Q6_K", "gguf:Q8_0", "native:affine-4-g64", "native:table-4", EXL2)
FEEDBACK_COLUMNS = 128
REFINE_COLUMNS = 256


class Gpu(NamedTuple):
    """From NVIDIA's data sheets and the CUDA programming guide: bytes, float32 and float64 operations (a fused
    multiply-add is two) a second, and what one SM holds."""

    name: str
    architecture: int
    bandwidth: float
    operations: float
    double_operations: float
    warps: int
    blocks: int


GPUS = (
    Gpu("RTX 4090", 89, 1008e9, 82.6e12, 1.29e12, 48, 24),
    Gpu("H100 SXM", 90, 3350e9, 66.9e12, 33.5e12, 64, 32),
)
REGISTERS_OF_AN_SM = 65536


@dataclass(frozen=True)
class Work:
    """One launch.

    moved       bytes that must cross the memory bus: every input once, every output once
    operations  additions and multiplications, at most
    prepare     makes the tensors and returns the launch
    doubles     whether they are of float64, not float32
    """

    name: str
    source: str
    kernel: str
    threads: int
    moved: int
    operations: int
    prepare: Callable[[], Callable[[], object]]
    doubles: bool = False


def packed(name: str) -> dict[str, Tensor]:
    """Planes of a random matrix on the GPU: one row's, repeated; of EXL2 32 rows'."""
    chosen, few = codec_named(name), 32 if name == EXL2 else 1
    weights = torch.randn(few, SIZE)
    if isinstance(chosen, SectionedCodec):
        sections = fit_sections.minmax_sections(chosen, weights, torch.randperm(SIZE))
        planes, repeated = chosen.encode(sections.numpy(), sections.nearest(weights).numpy()), {"q_weight", "q_scale"}
        shape: tuple[int, int] = (1, SIZE // few)
    else:
        assert isinstance(chosen, GridCodec)
        grid = fit.minmax(chosen, weights)
        planes, shape = chosen.encode(grid.numpy(), grid.nearest(weights).numpy()), (SIZE, 1)
        repeated = set(planes)
    tensors = {plane: torch.from_numpy(array) for plane, array in planes.items()}
    return {plane: (part.repeat(shape) if plane in repeated else part).cuda() for plane, part in tensors.items()}


def decoding(name: str) -> Work:
    def prepare() -> Callable[[], object]:
        planes = packed(name)
        return lambda: cuda_decode.decode(name, planes, SIZE, torch.float16)

    moved = nbytes(codec_named(name), SIZE, SIZE) + 2 * WEIGHTS
    label = f"decode {name} to float16"
    if name == EXL2:
        kernel, source, threads = "decode_exl2<__half>", cuda_exl2.SOURCE, cuda_exl2.DECODE_THREADS
    else:
        kernel = f"decode<{cuda_decode.READERS[name].type}, __half>"
        source, threads = cuda_decode.SOURCE, cuda_decode.THREADS
    return Work(label, source, kernel, threads, moved, 2 * WEIGHTS, prepare)


def multiplying(name: str, tokens: int) -> Work:
    def prepare() -> Callable[[], object]:
        planes, x = packed(name), torch.randn(tokens, SIZE, device="cuda", dtype=torch.float16)
        return lambda: cuda_multiply.multiply(x, name, planes)

    tile = cuda_multiply.TILES[tokens > 1]
    if name == EXL2:
        kernel, source, threads = f"multiply_exl2<__half, {tile}>", cuda_exl2.SOURCE, cuda_exl2.MULTIPLY_THREADS
    else:
        kernel = f"multiply<{cuda_decode.READERS[name].type}, __half, {tile}>"
        source, threads = cuda_multiply.SOURCE, cuda_multiply.THREADS
    moved = nbytes(codec_named(name), SIZE, SIZE) + 2 * tokens * (SIZE + SIZE)
    passes = -(-tokens // tile)  # each decodes the weights anew
    operations = 2 * WEIGHTS * tokens + 2 * WEIGHTS * passes
    label = f"multiply {name}, {tokens} token{'s' * (tokens > 1)}"
    return Work(label, source, kernel, threads, moved, operations, prepare)


def feedback() -> Work:
    """One block of columns: weights, scales and offsets in, codes and errors out."""
    width = FEEDBACK_COLUMNS

    def prepare() -> Callable[[], object]:
        weights, scale = torch.randn(SIZE, width, device="cuda"), torch.full((SIZE, width), 0.2, device="cuda")
        factor = torch.eye(width, device="cuda") + 0.1 * torch.randn(width, width, device="cuda").triu(1)
        levels = torch.arange(16.0, device="cuda")[None]
        return lambda: cuda_solve.feedback_block(weights, factor, scale, -8 * scale, levels, True, False)

    moved = SIZE * width * (3 * 4 + 5) + 4 * width * width
    operations = SIZE * (width * (width - 1) + 6 * width)
    label = f"error feedback, {width} columns"
    return Work(label, "feedback.cu", "feedback_block", cuda_solve.THREADS, moved, operations, prepare)


def refining() -> Work:
    """One sweep over a superblock of Q4_K, each number and each code moving: every move changes the whole gradient."""
    width, chosen = REFINE_COLUMNS, codec_named("gguf:Q4_K")
    assert isinstance(chosen, GridCodec)

    def prepare() -> Callable[[], object]:
        weights, mixing = torch.randn(SIZE, width, device="cuda"), torch.randn(width, width, device="cuda")
        hessian = mixing @ mixing.T / width + torch.eye(width, device="cuda")
        grid = fit.fit(chosen, weights, torch.ones(width, device="cuda"))
        codes = grid.nearest(weights)

        def run() -> None:
            values = grid.values(codes)
            gradient, block = (values - weights) @ hessian, slice(0, width)
            solve_cuda.refine_block(values, gradient, hessian, codes.clone(), grid, block, True)

        return run

    moved = SIZE * (width * (2 * 8 + 2) + 2 * 8 * 2 * 2 + 2 * 2 * 4) + 4 * width * width
    steps = 2 * (2 * width * width + 8 * 2 * 32 * 32)  # H d for a float16 and eight integers, of scale and offset
    pushes = (2 * 2 * width + width) * 2 * width
    label = f"coordinate descent, {width} columns of Q4_K"
    return Work(label, "refine.cu", "refine_block", cuda_solve.THREADS, moved, SIZE * (steps + pushes), prepare)


def fitting() -> Work:
    def prepare() -> Callable[[], object]:
        weights, importance = torch.randn(SIZE, SIZE, device="cuda"), torch.ones(SIZE, device="cuda")
        return lambda: fit.fit(codec_named("gguf:Q4_K"), weights, importance)

    ranges = len(fit.TWO_SIDED) + len(fit.TWO_SIDED_FINE)
    operations = WEIGHTS * ranges * (2 * 10 + 8)  # two refits and an error for each range
    moved = 4 * (WEIGHTS + SIZE) + 2 * 4 * WEIGHTS // 32
    return Work("fit of Q4_K's groups", "fit.cu", "fit_groups", cuda_solve.THREADS, moved, operations, prepare)


def clustering() -> Work:
    """Tables of 16; what sorts the rows and sums them up before is torch's."""

    def prepare() -> Callable[[], object]:
        weights, importance = torch.randn(SIZE, SIZE, device="cuda"), torch.ones(SIZE, device="cuda")
        return lambda: cuda_kmeans.weighted_kmeans(weights, importance, 16)

    levels = SIZE.bit_length()
    candidates = SIZE * 16 * SIZE * (levels + 1)  # of a level, one a value and one more for each that is looked for
    moved = 8 * SIZE * (SIZE + 3 * (SIZE + 1))
    label = "k-means, tables of 16"
    return Work(
        label, cuda_kmeans.SOURCE, cuda_kmeans.KERNEL, cuda_kmeans.THREADS, moved, 8 * candidates, prepare, True
    )


def choosing() -> Work:
    """EXL2's scale codes of one group of 128 columns at 4 bits, under all maxima of the first search."""
    width, maxima = 128, len(fit_sections.COARSE)

    def prepare() -> Callable[[], object]:
        weights, weight = torch.randn(SIZE, width, device="cuda"), torch.full((width,), 1 / width, device="cuda")
        shares = torch.tensor(fit_sections.COARSE, device="cuda")[:, None]
        scales = 0.5 * shares * (torch.arange(1, 17, device="cuda") / 16) ** 2
        return lambda: cuda_squared.best_subs(weights, weight, scales, -8.0, 7.0)

    moved = 4 * SIZE * width + 6 * SIZE * maxima
    operations = SIZE * maxima * 16 * 6 * width  # all 16 codes; most of a row's are not tried
    label = "EXL2's scale codes, 128 columns"
    source, kernel, threads = cuda_squared.SOURCE, cuda_squared.KERNEL, cuda_squared.THREADS
    return Work(label, source, kernel, threads, moved, operations, prepare)


def works() -> list[Work]:
    products = [multiplying(name, tokens) for name in FORMATS for tokens in (1, 16)]
    return [
        *(decoding(name) for name in FORMATS),
        *products,
        feedback(),
        refining(),
        fitting(),
        choosing(),
        clustering(),
    ]


def occupancy(gpu: Gpu, registers: int, threads: int) -> int:
    """Warps that one SM holds: registers are given out in units of 256 a warp. Shared memory never limits these."""
    warps = threads // 32
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(gpu.warps // warps, gpu.blocks, REGISTERS_OF_AN_SM // of_a_warp // warps) * warps


def floor(gpu: Gpu, work: Work) -> tuple[float, str]:
    """Seconds at least, and what bounds them."""
    peak = gpu.double_operations if work.doubles else gpu.operations
    memory, arithmetic = work.moved / gpu.bandwidth, work.operations / peak
    return max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"


def count() -> None:
    """Print the tables of docs/kernels.md."""
    print("| launch | MB | million operations | RTX 4090 | bound | H100 | bound |\n|---|---|---|---|---|---|---|")
    for work in works():
        floors = [floor(gpu, work) for gpu in GPUS]
        cells = " | ".join(f"{seconds * 1e6:.1f} us | {bound}" for seconds, bound in floors)
        print(f"| {work.name} | {work.moved / 1e6:.2f} | {work.operations / 1e6:.0f} | {cells} |")
    print("\n| kernel | registers sm_89 | warps of 48 | registers sm_90 | warps of 64 |")
    print("|---|---|---|---|---|")
    for work in {work.kernel: work for work in works()}.values():
        usages = [usage(work, gpu.architecture) for gpu in GPUS]
        cells = " | ".join(
            f"{used.registers} | {occupancy(gpu, used.registers, work.threads)}"
            for gpu, used in zip(GPUS, usages, strict=True)
        )
        print(f"| `{work.kernel}` | {cells} |")


def usage(work: Work, architecture: int):  # type: ignore[no-untyped-def]  # a Usage of tests/cudacpu/nvrtc.py
    nvrtc, harness = (_load(f"tests/cudacpu/{name}.py") for name in ("nvrtc", "harness"))
    options = [*cuda.options(), f"-I{harness.headers()}"]
    return nvrtc.compile_kernels(cuda.FOLDER / work.source, [work.kernel], architecture, options)[0]


def _load(path: str) -> ModuleType:
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """The median of some launches on the GPU alone, each after the L2 cache has been filled with other data. The GPU
    sleeps until everything is queued, so the time that launching takes on the host is not part of it."""
    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        other.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[3:])[repeats // 2]


def host_seconds(run: Callable[[], object], repeats: int = 100) -> float:
    """The mean of what a launch takes the host, which does not wait for the GPU."""
    torch.cuda.synchronize()
    began = perf_counter()
    for _ in range(repeats):
        run()
    took = perf_counter() - began
    torch.cuda.synchronize()
    return took / repeats


def time() -> None:
    """Print each launch's time and how near it is to the memory's floor."""
    if reason := cuda.missing():
        sys.exit(reason)
    large = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * len(large) / seconds(large.clone)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    print("| launch | us | floor us | share of the bandwidth | us on the host |\n|---|---|---|---|---|")
    for work in works():
        run = work.prepare()
        took, least = seconds(run), work.moved / bandwidth
        host = host_seconds(run) if took < 1e-3 else float("nan")  # the queue of launches is not endless
        print(f"| {work.name} | {took * 1e6:.1f} | {least * 1e6:.1f} | {least / took:.0%} | {host * 1e6:.0f} |")


if __name__ == "__main__":
    commands = {"count": count, "time": time}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
