"""Counts what each CUDA kernel must move and compute, and measures its time on a GPU beside the least possible time.

    python bench/kernels.py count   prints the tables of docs/kernels.md; needs no GPU, but NVRTC for registers
                                    (extra `test`)
    python bench/kernels.py time    prints each kernel's time on this machine's GPU beside its floor, which is bytes
                                    divided by the bandwidth that a copy reaches

All figures are for a matrix of 4096 x 4096 weights.
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

from lqexport.formats.codebook import EIGHT
from lqexport.formats.codec import GridCodec, SectionedCodec, TrellisCodec, nbytes
from lqexport.formats.registry import codec_named
from lqexport.grids import fit, fit_sections, vectors
from lqexport.kernels import (
    cuda,
    cuda_decode,
    cuda_exl2,
    cuda_exl3,
    cuda_kmeans,
    cuda_multiply,
    cuda_solve,
    cuda_squared,
    cuda_vectors,
)
from lqexport.kernels.vectors import ROUNDS, Book
from lqexport.solver import solve_cuda, solve_vectors

SIZE = 4096
WEIGHTS = SIZE * SIZE
EXL2, EXL3 = "exl2:4g128x32", "exl3:4"
FORMATS = ("gguf:Q4_0", "gguf:Q4_K", "gguf:Q6_K", "gguf:Q8_0", "native:affine-4-g64", "native:table-4", EXL2, EXL3)
VECTORS = "gguf:IQ2_XS"
FEEDBACK_COLUMNS = 128
REFINE_COLUMNS = 256


class Gpu(NamedTuple):
    """A GPU's figures from NVIDIA's data sheets and the CUDA programming guide.

    bandwidth   bytes per second
    operations, double_operations   float32 and float64 operations per second; a fused multiply-add counts as two
    warps, blocks   the most that one SM can hold
    """

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
    operations  the most additions and multiplications
    prepare     makes the tensors and returns the launch
    doubles     whether the operations are float64 instead of float32
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
    """Returns the planes of a random matrix on the GPU. They repeat those of one row (EXL2: of 32 rows)."""
    codec, few = codec_named(name), 32 if name == EXL2 else 1
    if isinstance(codec, TrellisCodec):  # any bits are a walk
        shapes = {plane: shape for plane, (_, shape) in codec.layout(SIZE, SIZE).items()}
        scales = {plane: torch.randn(shapes[plane], device="cuda").half() for plane in ("suh", "svh")}
        rings = torch.randint(-(2**15), 2**15, shapes["trellis"], dtype=torch.int16, device="cuda")
        return {"trellis": rings, **scales}
    weights = torch.randn(few, SIZE)
    if isinstance(codec, SectionedCodec):
        sections = fit_sections.minmax_sections(codec, weights, torch.randperm(SIZE))
        planes, repeated = codec.encode(sections.numpy(), sections.nearest(weights).numpy()), {"q_weight", "q_scale"}
        shape: tuple[int, int] = (1, SIZE // few)
    else:
        assert isinstance(codec, GridCodec)
        grid = fit.minmax(codec, weights)
        planes, shape = codec.encode(grid.numpy(), grid.nearest(weights).numpy()), (SIZE, 1)
        repeated = set(planes)
    tensors = {plane: torch.from_numpy(array) for plane, array in planes.items()}
    return {plane: (rows.repeat(shape) if plane in repeated else rows).cuda() for plane, rows in tensors.items()}


def decoding(name: str) -> Work:
    """Returns the launch that decodes a matrix to float16."""

    def prepare() -> Callable[[], object]:
        planes = packed(name)
        return lambda: cuda_decode.decode(name, planes, SIZE, torch.float16)

    moved = nbytes(codec_named(name), SIZE, SIZE) + 2 * WEIGHTS
    label, operations = f"decode {name} to float16", 2 * WEIGHTS
    if name == EXL2:
        kernel, source, threads = "decode_exl2<__half>", cuda_exl2.SOURCE, cuda_exl2.DECODE_THREADS
    elif name == EXL3:
        kernel, source, threads = "decode_exl3<Mul1, __half>", cuda_exl3.SOURCE, cuda_exl3.DECODE_THREADS
        operations += 2 * (7 + 2) * WEIGHTS  # seven sums of each rotation, and two scales
    else:
        kernel = f"decode<{cuda_decode.READERS[name].type}, __half>"
        source, threads = cuda_decode.SOURCE, cuda_decode.THREADS
    return Work(label, source, kernel, threads, moved, operations, prepare)


def multiplying(name: str, tokens: int) -> Work:
    """Returns the launch that multiplies activations by a packed matrix; for EXL3, the longest of its three."""

    def prepare() -> Callable[[], object]:
        planes, x = packed(name), torch.randn(tokens, SIZE, device="cuda", dtype=torch.float16)
        return lambda: cuda_multiply.multiply(x, name, planes)

    tile = cuda_multiply.TILES[tokens > 1]
    if name == EXL2:
        kernel, source, threads = f"multiply_exl2<__half, {tile}>", cuda_exl2.SOURCE, cuda_exl2.MULTIPLY_THREADS
    elif name == EXL3:
        kernel, source, threads = f"multiply_exl3<Mul1, {tile}>", cuda_exl3.SOURCE, cuda_exl3.MULTIPLY_THREADS
    else:
        kernel = f"multiply<{cuda_decode.READERS[name].type}, __half, {tile}>"
        source, threads = cuda_multiply.SOURCE, cuda_multiply.THREADS
    moved = nbytes(codec_named(name), SIZE, SIZE) + 2 * tokens * (SIZE + SIZE)
    passes = -(-tokens // tile)  # each pass decodes the weights again
    operations = 2 * WEIGHTS * tokens + 2 * WEIGHTS * passes
    label = f"multiply {name}, {tokens} token{'s' * (tokens > 1)}"
    return Work(label, source, kernel, threads, moved, operations, prepare)


def feedback() -> Work:
    """Returns the launch for one block of columns: weights, scales and offsets in, codes and errors out."""
    width = FEEDBACK_COLUMNS

    def prepare() -> Callable[[], object]:
        weights, scale = torch.randn(SIZE, width, device="cuda"), torch.full((SIZE, width), 0.2, device="cuda")
        upper = torch.eye(width, device="cuda") + 0.1 * torch.randn(width, width, device="cuda").triu(1)
        levels = torch.arange(16.0, device="cuda")[None]
        return lambda: cuda_solve.feedback_block(weights, upper, scale, -8 * scale, levels, True, False)

    moved = SIZE * width * (3 * 4 + 5) + 4 * width * width
    operations = SIZE * (width * (width - 1) + 6 * width)
    label = f"error feedback, {width} columns"
    return Work(label, "feedback.cu", "feedback_block", cuda_solve.THREADS, moved, operations, prepare)


def refining() -> Work:
    """Returns the launch of one sweep over a superblock of Q4_K.

    It counts a move of every number and every code. Each move changes the whole gradient.
    """
    width, codec = REFINE_COLUMNS, codec_named("gguf:Q4_K")
    assert isinstance(codec, GridCodec)

    def prepare() -> Callable[[], object]:
        weights, mixing = torch.randn(SIZE, width, device="cuda"), torch.randn(width, width, device="cuda")
        hessian = mixing @ mixing.T / width + torch.eye(width, device="cuda")
        grid = fit.fit(codec, weights, torch.ones(width, device="cuda"))
        codes = grid.nearest(weights)

        def run() -> None:
            values = grid.values(codes)
            gradient, block = (values - weights) @ hessian, slice(0, width)
            solve_cuda.refine_block(values, gradient, hessian, codes.clone(), grid, block, True, 1)

        return run

    moved = SIZE * (width * (2 * 8 + 2) + 2 * 8 * 2 * 2 + 2 * 2 * 4) + 4 * width * width
    steps = 2 * (2 * width * width + 8 * 2 * 32 * 32)  # H d for a float16 and eight integers, for scale and offset each
    pushes = (2 * 2 * width + width) * 2 * width
    label = f"coordinate descent, {width} columns of Q4_K"
    return Work(label, "refine.cu", "refine_block", cuda_solve.THREADS, moved, SIZE * (steps + pushes), prepare)


def fitting() -> Work:
    """Returns the launch that fits Q4_K's groups."""

    def prepare() -> Callable[[], object]:
        weights, importance = torch.randn(SIZE, SIZE, device="cuda"), torch.ones(SIZE, device="cuda")
        return lambda: fit.fit(codec_named("gguf:Q4_K"), weights, importance)

    ranges = len(fit.TWO_SIDED) + len(fit.TWO_SIDED_FINE)
    operations = WEIGHTS * ranges * (2 * 10 + 8)  # two refits and an error for each range
    moved = 4 * (WEIGHTS + SIZE) + 2 * 4 * WEIGHTS // 32
    return Work("fit of Q4_K's groups", "fit.cu", "fit_groups", cuda_solve.THREADS, moved, operations, prepare)


def clustering() -> Work:
    """Returns the launch for tables of 16 values. torch sorts the rows and computes the prefix sums before it."""

    def prepare() -> Callable[[], object]:
        weights, importance = torch.randn(SIZE, SIZE, device="cuda"), torch.ones(SIZE, device="cuda")
        return lambda: cuda_kmeans.weighted_kmeans(weights, importance, 16)

    levels = SIZE.bit_length()
    candidates = SIZE * 16 * SIZE * (levels + 1)  # a level tries one per value, and one more per searched value
    moved = 8 * SIZE * (SIZE + 3 * (SIZE + 1))
    label = "k-means, tables of 16"
    return Work(
        label, cuda_kmeans.SOURCE, cuda_kmeans.KERNEL, cuda_kmeans.THREADS, moved, 8 * candidates, prepare, True
    )


def choosing() -> Work:
    """Returns the launch for EXL2's scale codes: a group of 128 columns at 4 bits, all maxima of the first search."""
    width, maxima = 128, len(fit_sections.COARSE)

    def prepare() -> Callable[[], object]:
        weights, weight = torch.randn(SIZE, width, device="cuda"), torch.full((width,), 1 / width, device="cuda")
        shares = torch.tensor(fit_sections.COARSE, device="cuda")[:, None]
        scales = 0.5 * shares * (torch.arange(1, 17, device="cuda") / 16) ** 2
        return lambda: cuda_squared.best_subs(weights, weight, scales, -8.0, 7.0)

    moved = 4 * SIZE * width + 6 * SIZE * maxima
    operations = SIZE * maxima * 16 * 6 * width  # counts all 16 codes; most are not tried
    label = "EXL2's scale codes, 128 columns"
    source, kernel, threads = cuda_squared.SOURCE, cuda_squared.KERNEL, cuda_squared.THREADS
    return Work(label, source, kernel, threads, moved, operations, prepare)


def searching(codec: GridCodec) -> int:
    """Returns the most operations of a search of VECTORS' codebook for eight columns, where no vector is excluded."""
    book, half = book_of(codec), 28  # operations of the loss of half a vector
    return (len(book.starts) - 1) * (half + 32) + len(book.vectors) * half


def turning(codec: GridCodec) -> int:
    """Returns the most operations that find the vector and the signs of eight columns: all rounds, and all flips."""
    return ROUNDS * (searching(codec) + 8 * 8 * 7 + 8 * (8 * 17 + 28 * 6))


def book_of(codec: GridCodec) -> Book:
    assert codec.codebook is not None
    assert codec.levels is not None
    return vectors.book(codec.codebook, codec.levels.tobytes())


def vector_feedback() -> Work:
    """Returns the launch of `feedback` in a format with a codebook."""
    width, codec = FEEDBACK_COLUMNS, codec_named(VECTORS)
    assert isinstance(codec, GridCodec)

    def prepare() -> Callable[[], object]:
        weights, scale = torch.randn(SIZE, width, device="cuda"), torch.full((SIZE, width // EIGHT), 0.2, device="cuda")
        upper = torch.eye(width) + 0.1 * torch.randn(width, width).triu(1)
        inverse = torch.linalg.inv(solve_vectors.squares(upper))
        metric = inverse @ inverse.mT
        metrics = solve_vectors.metrics_of(metric, fit.minmax(codec, torch.randn(1, 2 * width)))
        weight = metric.float().diagonal(dim1=1, dim2=2).flatten()
        given = [tensor.cuda() for tensor in (upper, metrics, weight, inverse.float().contiguous())]
        book = cuda_vectors.on_device(book_of(codec), weights.device)
        return lambda: cuda_vectors.feedback_block(weights, *given, scale, book)

    moved = SIZE * width * (4 + 5) + 4 * SIZE * width // EIGHT + 4 * width * (width + 4 * EIGHT + 1)
    operations = SIZE * (width // EIGHT * turning(codec) + width * (width + 4 * EIGHT))
    label = f"error feedback of {VECTORS}, {width} columns"
    return Work(label, cuda_vectors.SOURCE, "feedback_vectors", cuda_solve.THREADS, moved, operations, prepare)


def vector_refining() -> Work:
    """Returns the launch of `refining` in a format with a codebook."""
    width, codec = REFINE_COLUMNS, codec_named(VECTORS)
    assert isinstance(codec, GridCodec)
    assert codec.scale is not None
    group = codec.scale.group

    def prepare() -> Callable[[], object]:
        weights, mixing = torch.randn(SIZE, width, device="cuda"), torch.randn(width, width, device="cuda")
        hessian = mixing @ mixing.T / width + torch.eye(width, device="cuda")
        grid, block = fit.fit(codec, weights, torch.ones(width, device="cuda")), slice(0, width)
        codes = grid.nearest(weights)
        values = grid.values(codes)
        gradient = (values - weights) @ hessian
        metrics = solve_vectors.metrics_of(solve_vectors.squares(hessian), grid).cuda()
        book = cuda_vectors.on_device(book_of(codec), weights.device)

        def run() -> None:
            changed, scale = [values.clone(), gradient.clone()], solve_cuda.stored(grid.scale, grid, block)
            cuda_vectors.refine_block(*changed, hessian, metrics, codes.clone(), group, scale, True, 1, book)

        return run

    moved = SIZE * (width * (2 * 8 + 2) + width // group * 2 * 2 + 2 * 4) + 4 * width * (width + 3 * EIGHT)
    steps = 2 * width * width + width // group * 2 * group * group  # H d for a float16 and sixteen integers
    pushes = (2 * width + width) * 2 * width
    eights = width // EIGHT * (turning(codec) + 3 * 17 * 8)
    label = f"coordinate descent, {width} columns of {VECTORS}"
    operations = SIZE * (steps + pushes + eights)
    return Work(label, cuda_vectors.SOURCE, "refine_vectors", cuda_solve.THREADS, moved, operations, prepare)


def vector_fitting() -> Work:
    """Returns the launch that fits the groups of a format with a codebook."""
    codec = codec_named(VECTORS)
    assert isinstance(codec, GridCodec)
    assert codec.scale is not None
    group = codec.scale.group

    def prepare() -> Callable[[], object]:
        weights, weight = torch.randn(SIZE, SIZE, device="cuda"), torch.full((SIZE,), 1 / group, device="cuda")
        cuts, book = torch.from_numpy(vectors.CUTS).cuda(), cuda_vectors.on_device(book_of(codec), weights.device)
        return lambda: cuda_vectors.fit_groups(weights, weight, cuts, SIZE // group, book)

    operations = WEIGHTS // EIGHT * (len(vectors.CUTS) + 2) * (searching(codec) + 8 * 10)
    moved = 4 * (WEIGHTS + SIZE) + 2 * 4 * WEIGHTS // group
    label = f"fit of {VECTORS}'s groups"
    return Work(label, cuda_vectors.SOURCE, "fit_vectors", cuda_solve.THREADS, moved, operations, prepare)


def works() -> list[Work]:
    """Returns all launches."""
    products = [multiplying(name, tokens) for name in FORMATS for tokens in (1, 16)]
    return [
        *(decoding(name) for name in FORMATS),
        *products,
        feedback(),
        refining(),
        fitting(),
        choosing(),
        clustering(),
        vector_feedback(),
        vector_refining(),
        vector_fitting(),
    ]


def occupancy(gpu: Gpu, registers: int, threads: int) -> int:
    """Returns the number of warps that one SM can hold.

    Registers are allocated in units of 256 per warp. Shared memory never limits these kernels.
    """
    warps = threads // 32
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(gpu.warps // warps, gpu.blocks, REGISTERS_OF_AN_SM // of_a_warp // warps) * warps


def floor(gpu: Gpu, work: Work) -> tuple[float, str]:
    """Returns the least seconds of a launch, and what bounds them."""
    peak = gpu.double_operations if work.doubles else gpu.operations
    memory, arithmetic = work.moved / gpu.bandwidth, work.operations / peak
    return max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"


def count() -> None:
    """Prints the tables of docs/kernels.md."""
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
    """Compiles a kernel and returns its registers and memory."""
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
    """Returns the median seconds of a launch on the GPU.

    The L2 cache is filled with other data before each launch. The GPU sleeps until everything is queued, so the host's
    time to launch is not part of the result.
    """
    filler = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        filler.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # in cycles: about a millisecond
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[3:])[repeats // 2]


def host_seconds(run: Callable[[], object], repeats: int = 100) -> float:
    """Returns the host's mean seconds for a launch. The host does not wait for the GPU."""
    torch.cuda.synchronize()
    began = perf_counter()
    for _ in range(repeats):
        run()
    took = perf_counter() - began
    torch.cuda.synchronize()
    return took / repeats


def time() -> None:
    """Prints each launch's time and how near it is to the memory's floor."""
    if reason := cuda.missing():
        sys.exit(reason)
    large = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * len(large) / seconds(large.clone)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s\n")
    print("| launch | us | floor us | share of the bandwidth | us on the host |\n|---|---|---|---|---|")
    for work in works():
        run = work.prepare()
        took, least = seconds(run), work.moved / bandwidth
        host = host_seconds(run) if took < 1e-3 else float("nan")  # a slow kernel would fill the queue of launches
        print(f"| {work.name} | {took * 1e6:.1f} | {least * 1e6:.1f} | {least / took:.0%} | {host * 1e6:.0f} |")


if __name__ == "__main__":
    commands = {"count": count, "time": time}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]]()
