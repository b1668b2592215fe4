"""Verification decodes by the CUDA kernels too, says so, and names what they decode otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lqexport.artifact import StoredTensor, decoded
from lqexport.crosscheck import CrossCheck
from lqexport.formats.registry import codec
from lqexport.kernels import cuda, cuda_decode
from lqexport.progress import Silent
from lqexport.verification import Verification, check_tensors

NAMES = ["gguf:Q4_K", "gguf:F32", "native:table-3"]


def tensor(name: str) -> StoredTensor:
    rng = np.random.default_rng(0)
    rows = 1 if name == "gguf:F32" else 3
    planes = {
        plane: rng.integers(0, 60, np.prod(shape) * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(shape)
        for plane, (dtype, shape) in codec(name).layout(rows, 256).items()
    }
    return StoredTensor(name, name, (256,) if rows == 1 else (rows, 256), planes)


class Model:
    """A written model of three tensors; its source has none of them."""

    config: dict[str, object] = {}  # noqa: RUF012

    def names(self) -> list[str]:
        return NAMES

    def planes(self, name: str) -> tuple[str, dict[str, np.ndarray], tuple[int, ...]]:
        stored = tensor(name)
        return stored.codec, stored.planes, stored.shape


@pytest.fixture
def kernels(kernels_on: Callable[[str, dict[str, list[str]]], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, on the CPU."""
    kernels_on("plain", {cuda_decode.SOURCE: [f"decode<{cuda_decode.READERS[name].type}, float>" for name in NAMES]})
    monkeypatch.setattr(cuda, "usable", lambda device: True)


def verified() -> Verification:
    result = Verification("file", "", "", "", "lqexport", "cpu", "", "", {})

    class Source:
        def names(self) -> list[str]:
            return []

    check_tensors(result, Model(), None, Source(), None, Silent())  # type: ignore[arg-type]
    return result


@pytest.mark.usefixtures("kernels")
def test_what_is_decoded_alike_passes() -> None:
    result = verified()
    assert result.failed == []
    assert result.decoding == "NumPy and the CUDA kernels, the same bits in 3 of 3 tensors"


@pytest.mark.usefixtures("kernels")
def test_one_wrong_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_decode.decode

    def wrong(name: str, planes: dict[str, torch.Tensor], columns: int) -> torch.Tensor:
        values = right(name, planes, columns)
        if name == "native:table-3":
            values.view(torch.int32)[1, 17] ^= 1
        return values

    monkeypatch.setattr(cuda_decode, "decode", wrong)
    result = verified()
    assert result.failed == ["1 tensors decode to other values by the CUDA kernels: native:table-3."]
    assert result.decoding.endswith("2 of 3 tensors")


@pytest.mark.usefixtures("kernels")
def test_nans_are_alike_whatever_their_bits() -> None:
    check, stored = CrossCheck("cpu"), tensor("gguf:F32")
    stored.planes["blocks"].view(np.float32)[0, :2] = np.nan
    values = decoded(stored)
    values[0] = -values[0]
    check.add(stored, values)
    assert (check.compared, check.different) == (1, [])


def test_without_kernels_numpy_decodes_alone_and_it_says_why() -> None:
    assert verified().decoding == "NumPy"
    if cuda.missing() is None:
        pytest.skip("the kernels can run here")
    assert CrossCheck("cuda").sentence(3).startswith("NumPy alone. CuPy ")
