"""Checks the numbers that the blocks of a tensor hold: scales that are not finite, zero or out of line, and codes that
the type does not define."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.converters.gguf.header import TensorData
from lqexport.errors import listed
from lqexport.formats.gguf_vectors import scattered_half
from lqexport.runtime.progress import Listener

CHUNK = 1 << 24
"""Bytes that are looked at together."""
FAR = 1000.0
"""A block's scale is out of line if it is this many times the median of the tensor's."""
Bytes = NDArray[np.uint8]


def _no_codes(blocks: Bytes) -> NDArray[np.bool_]:
    return np.zeros(len(blocks), bool)


def _ternary_pairs(blocks: Bytes) -> NDArray[np.bool_]:
    """Returns whether a block of TQ2_0 holds the code 3."""
    codes = blocks[:, :64]
    return np.asarray((codes & (codes >> 1) & 0x55).any(1))


_FIVE_TRITS = np.isin(np.arange(256), [(256 * number + 242) // 243 for number in range(243)])


def _ternary_fives(blocks: Bytes) -> NDArray[np.bool_]:
    """Returns whether a block of TQ1_0 holds a byte that no five ternary digits make."""
    return np.asarray(~_FIVE_TRITS[blocks[:, :52]].all(1))


def _exponents(blocks: Bytes) -> NDArray[np.bool_]:
    """Returns whether a block of MXFP4 has the exponent 255, which stands for NaN."""
    return blocks[:, 0] == 255


def _small_floats(blocks: Bytes) -> NDArray[np.bool_]:
    """Returns whether a block of NVFP4 has a scale that stands for NaN."""
    return np.asarray(((blocks[:, :4] & 0x7F) == 0x7F).any(1))


def _scale_of_fourths(blocks: Bytes) -> NDArray[np.float32]:
    """Returns the scale of each block of IQ1_M, which its last four words share."""
    return scattered_half(np.ascontiguousarray(blocks[:, 48:]).view("<u2")).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """The positions of the numbers within a block.

    size        bytes of a block
    scales      offsets of its float16 numbers, the scale of the codes first
    codes       first and last offset (exclusive) of its codes
    undefined   returns whether each block holds what the type does not define
    scattered   returns the float16 number of each block whose bits are not beside each other
    """

    size: int
    scales: tuple[int, ...] = ()
    codes: tuple[int, int] = (0, 0)
    undefined: Callable[[Bytes], NDArray[np.bool_]] = _no_codes
    scattered: Callable[[Bytes], NDArray[np.float32]] | None = None


LAYOUTS = {
    "Q4_0": Layout(18, (0,), (2, 18)),
    "Q4_1": Layout(20, (0, 2), (4, 20)),
    "Q5_0": Layout(22, (0,), (6, 22)),
    "Q5_1": Layout(24, (0, 2), (8, 24)),
    "Q8_0": Layout(34, (0,), (2, 34)),
    "Q2_K": Layout(84, (80, 82), (16, 80)),
    "Q3_K": Layout(110, (108,), (32, 96)),
    "Q4_K": Layout(144, (0, 2), (16, 144)),
    "Q5_K": Layout(176, (0, 2), (48, 176)),
    "Q6_K": Layout(210, (208,), (0, 128)),
    "IQ4_NL": Layout(18, (0,), (2, 18)),
    "IQ4_XS": Layout(136, (0,), (8, 136)),
    "IQ3_XXS": Layout(98, (0,), (2, 66)),
    "IQ3_S": Layout(110, (0,), (2, 66)),
    "IQ2_XXS": Layout(66, (0,), (2, 66)),
    "IQ2_XS": Layout(74, (0,), (2, 66)),
    "IQ2_S": Layout(82, (0,), (2, 34)),
    "IQ1_S": Layout(50, (0,), (2, 34)),
    "IQ1_M": Layout(56, codes=(0, 32), scattered=_scale_of_fourths),
    "TQ1_0": Layout(54, (52,), (0, 52), _ternary_fives),
    "TQ2_0": Layout(66, (64,), (0, 64), _ternary_pairs),
    "Q1_0": Layout(18, (0,), (2, 18)),
    "MXFP4": Layout(17, undefined=_exponents),
    "NVFP4": Layout(36, undefined=_small_floats),
}
"""Type -> layout of a block, as in ggml's `ggml-common.h`."""
FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


@dataclass
class Counts:
    """The numbers of blocks or weights of a tensor that a check counts."""

    blocks: int = 0
    not_finite: int = 0
    undefined: int = 0
    lost: int = 0
    far: int = 0


def check_values(file: OpenFile, listener: Listener) -> Iterator[Problem]:
    """Yields the problems of the numbers of all tensors, one sentence for each sort of problem. Reads every byte."""
    listener.stage("Read the tensors", len(file.tensors))
    counts = {}
    for name, tensor in file.tensors.items():
        counts[name] = counted(tensor)
        listener.advance(1)
    for attribute, make, sentence in (
        ("not_finite", error, "hold numbers that are infinite or not a number"),
        ("undefined", error, "hold codes that their type does not define"),
        ("lost", warning, "have blocks whose scale is 0 although their codes differ"),
        ("far", warning, f"have blocks whose scale is more than {FAR:g} times the tensor's median"),
    ):
        shown = [f"{name} ({number})" for name, count in counts.items() if (number := getattr(count, attribute))]
        if shown:
            yield make("values", f"{len(shown)} tensors {sentence}: {listed(shown, 3)}.")


def counted(tensor: TensorData) -> Counts:
    """Returns what is wrong in a tensor."""
    if tensor.tensor_type in (*FLOATS, "BF16"):
        return _counted_floats(tensor)
    layout, counts = LAYOUTS.get(tensor.tensor_type), Counts()
    if layout is None:
        return counts
    scales = []
    step = max(1, CHUNK // layout.size)
    data = tensor.data.reshape(-1, layout.size)
    for start in range(0, len(data), step):
        blocks = np.asarray(data[start : start + step])
        counts.undefined += int(layout.undefined(blocks).sum())
        numbers = [_half(blocks, offset) for offset in layout.scales]
        numbers += [layout.scattered(blocks)] if layout.scattered else []
        counts.not_finite += sum(int((~np.isfinite(number)).sum()) for number in numbers)
        if numbers:
            counts.lost += _lost(blocks[numbers[0] == 0], layout.codes)
            scales.append(np.abs(numbers[0]))
    counts.blocks, counts.far = len(data), _far(np.concatenate(scales)) if scales else 0
    return counts


def _half(blocks: Bytes, offset: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")[:, 0].astype(np.float32)


def _lost(blocks: Bytes, codes: tuple[int, int]) -> int:
    """Returns the number of blocks whose bytes of codes are not all alike."""
    inside = blocks[:, slice(*codes)]
    return int((inside != inside[:, :1]).any(1).sum())


def _far(scales: NDArray[np.float32]) -> int:
    used = scales[(scales > 0) & np.isfinite(scales)]
    return int((used > FAR * np.median(used)).sum()) if len(used) else 0


def _counted_floats(tensor: TensorData) -> Counts:
    counts = Counts()
    for start in range(0, tensor.nbytes, CHUNK):
        chunk = tensor.data[start : start + CHUNK]
        if tensor.tensor_type == "BF16":
            counts.not_finite += int(((chunk.view("<u2") & 0x7F80) == 0x7F80).sum())
        else:
            counts.not_finite += int((~np.isfinite(chunk.view(FLOATS[tensor.tensor_type]))).sum())
    return counts
