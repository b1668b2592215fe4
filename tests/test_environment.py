"""Devices, float32 settings, threads and versions."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lqexport.errors import UserError
from lqexport.runtime import products
from lqexport.runtime.environment import choose_device, full_float32, versions


@pytest.mark.parametrize("fast", [False, True])
def test_products_are_those_of_torch(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fast and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "has_fast_products", lambda: fast)
    draw = torch.Generator().manual_seed(0)
    for rows, columns, inner in ((5, 7, 300), (0, 3, 4), (3, 4, 0)):
        left = torch.randn(inner, rows, generator=draw).T  # not contiguous
        right = torch.randn(columns, inner + 2, generator=draw)[:, 2:]
        expected = left.double() @ right.double().T
        added = torch.ones(rows, columns)
        products.add_times_transposed(added, left, right)
        for product in (products.times_transposed(left, right), added - 1):
            torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("present", "name", "chosen"),
    [
        (0, "auto", "cpu"),
        (1, "auto", "cuda"),
        (1, "cpu", "cpu"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_device_is_the_one_named(present: int, name: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(present, monkeypatch)
    assert choose_device(name) == torch.device(chosen)


@pytest.mark.parametrize(("present", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_absent_device_is_said(present: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(present, monkeypatch)
    with pytest.raises(UserError, match=f"no CUDA device {name} here"):
        choose_device(name)


@pytest.mark.parametrize("name", ["tpu", "meta", "mps", "cuda:", "cuda:x", "gpu", ""])
def test_unknown_device_is_said(name: str) -> None:
    with pytest.raises(UserError, match="choose auto, cpu or cuda"):
        choose_device(name)


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


def test_versions_are_the_installed_ones() -> None:
    assert versions("numpy") == {"numpy": np.__version__}


def test_float32_is_multiplied_in_float32() -> None:
    torch.set_float32_matmul_precision("high")
    assert torch.backends.cuda.matmul.allow_tf32  # so that full_float32 has something to change
    full_float32()
    assert not torch.backends.cuda.matmul.allow_tf32


THREADS = """
import sys
import torch
from lqexport.runtime.environment import steady_threads
from lqexport.kernels.threads import start_pool
steady_threads() if sys.argv[1] == "steady" else None
start_pool()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(("how", "threads"), [("steady", 1), ("as it comes", 2)])
def test_compiled_loops_leave_torch_its_threads(how: str, threads: int) -> None:
    """The second case shows what happens without `steady_threads`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": "omp"}
    command = [sys.executable, "-c", THREADS, how]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    assert int(done.stdout) == threads


MISALIGNED = """
import numpy, torch, lqexport

def at(matrix, offset):
    room = numpy.zeros(matrix.numel() * 8 + 128, numpy.uint8)
    first = -room.ctypes.data % 64 + offset
    copy = torch.from_numpy(room[first : first + matrix.numel() * 8].view(numpy.float64)).view(matrix.shape)
    return copy.copy_(matrix)

a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((33, 100), (77, 100)))
products = [torch.nn.functional.linear(at(a, i), at(b, j)) for i in (0, 8, 16, 32) for j in (0, 8, 16, 32)]
assert all(torch.equal(product, products[0]) for product in products)
"""


def test_products_do_not_depend_on_where_their_operands_lie() -> None:
    subprocess.run([sys.executable, "-c", MISALIGNED], check=True)
