"""Verification decodes with the CUDA kernels too, says so, and names the tensors that they decode otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lqexport.formats.registry import codec_named
from lqexport.kernels import cuda, cuda_decode, cuda_exl2, cuda_exl3
from lqexport.runtime.progress import Silent
from lqexport.storage.artifact import StoredTensor, decoded
from lqexport.verification.crosscheck import CrossCheck
from lqexport.verification.result import Verification
from lqexport.verification.verify_tensors import check_tensors

NAMES = ["gguf:Q4_K", "gguf:F32", "native:table-3", "exl2:4g32x3+2g32x5", "exl3:2.5"]


def tensor(name: str) -> StoredTensor:
    rng = np.random.default_rng(0)
    rows = {"gguf:F32": 1, "exl2:4g32x3+2g32x5": 32}.get(name, 3)
    planes = {
        plane: rng.integers(0, 60, np.prod(shape) * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(shape)
        for plane, (dtype, shape) in codec_named(name).layout(rows, 256).items()
    }
    if name.startswith("exl2:"):
        lines = np.cumsum([0, 4, 4, 4, 2, 2, 2, 2], dtype=np.int16)
        planes["q_groups"] = np.stack([np.repeat(np.int16([4, 2]), [3, 5]), lines], axis=1).ravel()
        planes["q_invperm"] = rng.permutation(256).astype(np.int32)
    return StoredTensor(name, name, (256,) if rows == 1 else (rows, 256), planes)


class Model:
    """A written model with one tensor for each of NAMES. Its source has none of them."""

    config: dict[str, object] = {}  # noqa: RUF012

    def names(self) -> list[str]:
        return NAMES

    def planes(self, name: str) -> tuple[str, dict[str, np.ndarray], tuple[int, ...]]:
        stored = tensor(name)
        return stored.codec_name, stored.planes, stored.shape


@pytest.fixture
def kernels(kernels_on: Callable[[str, dict[str, list[str]]], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes verification use the CUDA kernels, which run on the CPU."""
    readers = [cuda_decode.READERS[name].type for name in NAMES if name in cuda_decode.READERS]
    kernels_on(
        "plain",
        {
            cuda_decode.SOURCE: [f"decode<{reader}, float>" for reader in readers],
            cuda_exl2.SOURCE: cuda_exl2.kernels(),
            cuda_exl3.SOURCE: cuda_exl3.kernels(),
        },
    )
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
    assert result.decoding == "NumPy and the CUDA kernels, the same bits in 5 of 5 tensors"


@pytest.mark.usefixtures("kernels")
def test_one_wrong_bit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda_decode.decode

    def wrong(name: str, planes: dict[str, torch.Tensor], columns: int, dtype: torch.dtype) -> torch.Tensor:
        values = right(name, planes, columns, dtype)
        if name == "native:table-3":
            values.view(torch.int32)[1, 17] ^= 1
        return values

    monkeypatch.setattr(cuda_decode, "decode", wrong)
    result = verified()
    assert result.failed == ["1 tensors decode to other values by the CUDA kernels: native:table-3."]
    assert result.decoding.endswith("4 of 5 tensors")


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
