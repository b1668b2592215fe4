"""The launcher with a stand-in for CuPy: what it compiles, its stream, and the arguments that a kernel gets."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lqexport.kernels import cuda


class FakeCupy(SimpleNamespace):
    """A stand-in for CuPy with one device, on which nothing runs. `log` holds the requests."""

    def __init__(self, devices: int = 1) -> None:
        self.log: list[Any] = []
        runtime = SimpleNamespace(getDeviceCount=lambda: devices, CUDARuntimeError=OSError)
        nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
        super().__init__(
            cuda=SimpleNamespace(runtime=runtime, nvrtc=nvrtc, Device=self.entered("device")),
            RawModule=self.compiled,
        )

    def entered(self, name: str) -> Any:
        @contextlib.contextmanager
        def enter(*values: int) -> Iterator[None]:
            self.log.append((name, *values))
            yield

        return enter

    def compiled(self, **given: Any) -> Any:
        self.log.append(("compiled", given))
        return SimpleNamespace(get_function=lambda name: lambda *a, **k: self.log.append(("launched", name, a, k)))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    forget()
    yield fake
    forget()


def forget() -> None:
    cuda.missing.cache_clear()
    cuda._function.cache_clear()


def test_a_launch(cupy: FakeCupy) -> None:
    half, brain = torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)
    for _ in range(2):
        cuda.launch("decode.cu", "decode<Blocks<Q4_0>, float>", 3, 256, [half, brain, None, 7, 0.5], shared_bytes=64)
    device, (_, module), (_, name, (blocks, threads, arguments), options), *again = cupy.log
    assert device == ("device", 0)
    assert module["code"] == (cuda.FOLDER / "decode.cu").read_text()
    assert module["name_expressions"] == (name,) == ("decode<Blocks<Q4_0>, float>",)
    assert f"-I{cuda.FOLDER}" in module["options"]
    assert (blocks, threads, options) == ((3,), (256,), {"shared_mem": 64, "stream": (1234,)})
    assert options["stream"].ptr == 1234
    pointers = [(part.data_ptr(), np.uint64) for part in (half, brain)]
    expected = [*pointers, (0, np.uint64), (7, np.int32), (0.5, np.float32)]
    assert [(value, value.dtype) for value in arguments] == expected
    assert [entry[0] for entry in again] == ["device", "launched"]  # compiled once


def test_headers_are_part_of_what_cupys_cache_compares(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "common.cuh").write_text("a")
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    before = cuda.options()
    (tmp_path / "common.cuh").write_text("b")
    assert cuda.options() != before


def test_usable_on_its_devices_alone(cupy: FakeCupy) -> None:
    assert cuda.missing() is None
    assert cuda.usable(torch.device("cuda"))
    assert not cuda.usable(torch.device("cpu"))


def test_each_thing_that_is_missing_is_said(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no\nlibnvrtc")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    assert cuda.missing() == "CuPy finds no CUDA device."
    forget()
    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", fail)
    assert str(cuda.missing()).startswith("CuPy finds no NVRTC to compile with (no libnvrtc); pip install '.[cuda]'")
    forget()
    monkeypatch.setitem(sys.modules, "cupy", None)
    reason = cuda.missing()
    assert reason is not None
    assert reason.startswith("CuPy cannot be imported (")
    with pytest.raises(cuda.KernelsMissingError, match=r"pip install '\.\[cuda\]'"):
        cuda.launch("decode.cu", "decode<Plain<float>, float>", 1, 1, [])
