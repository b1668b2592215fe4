"""Takes apart tensors of a GGUF file that hold the gate and up projections of all experts of a block together."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.gguf.header import TensorData

FUSED, PARTS = "ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight")
"""The tensor [experts, rows, columns], and the two that share the rows of each expert: the first has the first half."""


@dataclass(frozen=True)
class Half(TensorData):
    """One half of the rows of each expert of a fused tensor.

    half   0 for the first half, 1 for the second
    """

    half: int

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes [experts, bytes of an expert's half], mapped only while the array lives."""
        whole = np.memmap(self.path, np.uint8, "r", self.begin, (2 * self.nbytes,))
        return whole.reshape(self.shape[0], 2, -1)[:, self.half]


def taken_apart(tensors: dict[str, TensorData]) -> dict[str, TensorData]:
    """Returns a file's tensors with two tensors in the place of each fused one.

    A fused tensor of another form stays as it is.
    """
    result: dict[str, TensorData] = {}
    for name, tensor in tensors.items():
        prefix, _, end = name.rpartition(FUSED)
        if end or not prefix.startswith("blk.") or len(tensor.shape) != 3 or tensor.shape[1] % 2:
            result[name] = tensor
            continue
        values = {field.name: getattr(tensor, field.name) for field in fields(TensorData)}
        values["shape"] = (tensor.shape[0], tensor.shape[1] // 2, tensor.shape[2])
        values["nbytes"] = tensor.nbytes // 2
        result |= {prefix + part: Half(**values, half=half) for half, part in enumerate(PARTS)}
    return result
