"""The harness that runs CUDA kernels on the CPU finds every planted bug, and accepts kernels that are right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

BUGS = {
    "reads_past_the_end": ("address", "heap-buffer-overflow"),
    "writes_past_the_end": ("address", "heap-buffer-overflow"),
    "reads_before_the_start": ("address", "heap-buffer-overflow"),
    "leaves_shared_memory": ("address", "global-buffer-overflow|out of bounds"),
    "leaves_dynamic_shared_memory": ("address", "heap-buffer-overflow"),
    "leaves_a_local_array": ("address", "stack-buffer-overflow|out of bounds"),
    "loads_unaligned": ("address", "misaligned address"),
    "shifts_too_far": ("address", "shift exponent"),
    "overflows_an_index": ("address", "signed integer overflow"),
    "turns_a_large_float_into_an_int": ("address", "outside the range"),
    "misses_a_barrier": ("thread", "data race"),
    "misses_the_second_barrier_of_a_loop": ("thread", "data race"),
    "misses_a_barrier_before_global_memory": ("thread", "data race"),
    "misses_a_warp_barrier": ("thread", "data race"),
    "takes_a_shuffle_for_a_warp_barrier": ("thread", "data race"),
    "races_with_other_blocks": ("thread", "data race"),
    "lets_threads_write_one_place": ("thread", "data race"),
    "meets_at_two_barriers": ("plain", "meet at different __syncthreads"),
    "waits_for_ever": ("plain", "deadlock"),
    "is_not_in_its_own_mask": ("plain", "not in its own mask"),
    "reads_a_lane_outside_the_mask": ("plain", "reads lane 20, which is not there"),
    "reads_a_lane_that_has_left": ("plain", "which is not there"),
    "meets_at_two_shuffles": ("plain", "meet at different operations"),
}
"""Kernel of bugs.cu -> the build that finds its bug, and words of the message."""
RIGHT = {
    "right_sum": lambda x: x.sum(),
    "right_tiles": lambda x: x.flip(0) * 3 + 3,
    "right_warp": lambda x: (x + torch.where(HALF, x[torch.arange(256) ^ 8], 0))[torch.arange(256) ^ 1],
    "right_exit": lambda x: x[:128],
    "right_blocks": lambda x: x[:64].flip(0).repeat(4),
}
HALF = torch.arange(256) % 32 < 16
UNSET = "reads_unset_shared_memory"
BLOCKS = {"races_with_other_blocks": 4, "right_blocks": 4}
SHARED = 256 * 4


@pytest.fixture(scope="module")
def run(cuda_harness: ModuleType, cuda_folder: Path) -> Callable[..., torch.Tensor]:
    """A function that runs a kernel of bugs.cu in one build on x = 0..255 and returns y."""

    def run(kernel: str, flavour: str, seed: int = 1) -> torch.Tensor:
        source = cuda_harness.HERE / "bugs.cu"
        program = cuda_harness.build(source, [*BUGS, *RIGHT, UNSET], flavour, cuda_folder)
        x, y = torch.arange(256.0), torch.full((256,), -1.0)
        program.run(kernel, BLOCKS.get(kernel, 1), 256, [x, y, 256], SHARED, seed)
        return y

    return run


def test_every_kernel_of_the_file_is_tried(root: Path) -> None:
    kernels = re.findall(r"^KERNEL\((\w+)\)", (root / "tests/cudacpu/bugs.cu").read_text(), re.MULTILINE)
    assert sorted(kernels) == sorted([*BUGS, *RIGHT, UNSET])


@pytest.mark.parametrize("kernel", BUGS)
def test_a_planted_bug_is_found(kernel: str, run: Callable[..., torch.Tensor], cuda_harness: ModuleType) -> None:
    flavour, words = BUGS[kernel]
    with pytest.raises(cuda_harness.KernelError, match=words):
        run(kernel, flavour)


@pytest.mark.parametrize("flavour", ["plain", "address", "thread"])
@pytest.mark.parametrize("kernel", RIGHT)
def test_a_right_kernel_is_left_alone(kernel: str, flavour: str, run: Callable[..., torch.Tensor]) -> None:
    expected = RIGHT[kernel](torch.arange(256.0)).reshape(-1)
    for seed in (1, 2):
        torch.testing.assert_close(run(kernel, flavour, seed)[: len(expected)], expected)


def test_unset_shared_memory_is_no_number(run: Callable[..., torch.Tensor]) -> None:
    y = run(UNSET, "plain")
    assert bool(y[:200].isfinite().all())
    assert bool(y[200:].isnan().all())


def test_the_order_of_threads_depends_on_the_seed(run: Callable[..., torch.Tensor]) -> None:
    """If two threads write the same place, the last wins. Another seed lets another thread win."""
    assert not torch.equal(
        run("lets_threads_write_one_place", "plain", 1), run("lets_threads_write_one_place", "plain", 2)
    )


def test_a_launch_that_no_device_takes_is_refused(cuda_harness: ModuleType, cuda_folder: Path) -> None:
    program = cuda_harness.build(cuda_harness.HERE / "bugs.cu", [*BUGS, *RIGHT, UNSET], "plain", cuda_folder)
    x = torch.zeros(256)
    with pytest.raises(cuda_harness.KernelError, match="1025 threads"):
        program.run("right_exit", 1, 1025, [x, x, 256])
    with pytest.raises(cuda_harness.KernelError, match="no kernel"):
        program.run("absent", 1, 256, [x, x, 256])
