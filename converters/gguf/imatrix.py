"""llama.cpp's importance matrices: how large the inputs of every linear are, by its weight's GGUF name.

A GGUF file has two float32 tensors for each weight: NAME.in_sum2 [matrices, columns], the sums of squared inputs, and
NAME.counts [matrices, 1], the numbers of tokens. Experts that share a tensor are its matrices. The older format, which
llama-imatrix still writes with `--output-format dat`, is little-endian:

    int32 number of weights; for each: int32 length of its name, the name,
        int32 calls, int32 number of values, float32 values (mean squares times calls)
    then, if the file is not older still: int32 chunks, int32 length of the data set's name, the name
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from lqexport.converters.gguf.file import write_arrays
from lqexport.converters.gguf.header import TensorData, read_header
from lqexport.errors import UserError

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class ImportanceMatrix:
    """The mean squared input of every column of every weight.

    means      weight name -> float32 [matrices, columns]; a matrix that no token reached has ones
    datasets   the names of the texts that it was collected on
    """

    means: dict[str, NDArray[np.float32]]
    datasets: tuple[str, ...] = field(default=())

    def mean(self, weight_name: str, expert: int | None, columns: int, groups: int = 1) -> NDArray[np.float32] | None:
        """Returns the mean squares of a weight's inputs, float32 [columns]; None if it has none.

        expert   the number of the expert within the weight's tensor; None for a weight of no expert
        groups   the number of matrices that the weight is in the file; the result is the mean over them

        The old format has one matrix for all experts of a tensor, one after the other. Raises ValueError if the number
        of columns is another.
        """
        if weight_name not in self.means:
            return None
        means = self.means[weight_name].reshape(-1)
        if len(means) == groups * columns:
            means = means.reshape(groups, columns).mean(0)
        start = (expert or 0) * columns
        if len(means) % columns or start + columns > len(means) or (expert is None and len(means) != columns):
            raise ValueError(f"it has {len(means)} numbers for {weight_name}, whose inputs are {columns}")
        return means[start : start + columns]


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Returns the importance matrix in a file of either format.

    Raises UserError if the file is missing, damaged, of something else, or holds numbers that are no mean squares.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    matrix = _read_gguf(path) if is_gguf else _read_old(path)
    for name, means in matrix.means.items():
        if not (np.isfinite(means).all() and (means >= 0).all()):
            raise UserError(f"{path} is damaged: its numbers for {name} are not finite and positive.")
    return matrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    metadata, tensors = read_header(path)
    if metadata.get("general.type") != "imatrix":
        raise UserError(f"{path} is a GGUF file of something else, and no importance matrix (general.type imatrix).")
    means = {}
    for name, sums in tensors.items():
        if name.endswith(SUMS):
            weight = name.removesuffix(SUMS)
            counts = tensors.get(weight + COUNTS)
            if counts is None:
                raise UserError(f"{path} is damaged: it has {name} and no {weight}{COUNTS}.")
            means[weight] = _means(path, weight, _floats(path, name, sums), _floats(path, weight + COUNTS, counts))
    return ImportanceMatrix(means, tuple(map(str, metadata.get(DATASETS, ()))))


def _floats(path: Path, name: str, tensor: TensorData) -> NDArray[np.float32]:
    """Returns a tensor's numbers, float32 of its shape. Raises UserError if they have another type."""
    if tensor.tensor_type != "F32":
        raise UserError(f"{path} is damaged: {name} has the type {tensor.tensor_type}, not F32.")
    return np.array(tensor.data).view(np.float32).reshape(tensor.shape)


def _means(
    path: Path, weight: str, sums: NDArray[np.float32], counts: NDArray[np.float32]
) -> NDArray[np.float32]:  # fmt: skip
    """Returns sums [matrices, columns] divided by counts [matrices, 1], and ones where a count is zero."""
    sums = sums.reshape(-1, sums.shape[-1])
    counts = counts.reshape(-1, 1)
    if len(counts) not in (1, len(sums)):
        raise UserError(f"{path} is damaged: {weight} has {len(sums)} matrices and {len(counts)} counts.")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)


class _Bytes:
    """The bytes of a file of the old format, read from the front. Raises ValueError beyond its end."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    @property
    def ended(self) -> bool:
        return self._at == len(self._content)

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self._content) - self._at:
            raise ValueError
        self._at += count
        return self._content[self._at - count : self._at]

    def integer(self) -> int:
        return int.from_bytes(self.take(4), "little", signed=True)


def _read_old(path: Path) -> ImportanceMatrix:
    content, means = _Bytes(path.read_bytes()), dict[str, NDArray[np.float32]]()
    try:
        for _ in range(content.integer()):
            name = content.take(content.integer()).decode()
            calls = max(1, content.integer())
            values = np.frombuffer(content.take(4 * content.integer()), "<f4")
            means[name] = (values.astype(np.float32) / np.float32(calls))[None]
        datasets = () if content.ended else (_old_dataset(content),)
    except ValueError:
        raise UserError(f"{path} is no importance matrix, or is truncated: copy or download it again.") from None
    if not means:
        raise UserError(f"{path} has no entries of an importance matrix.")
    return ImportanceMatrix(means, datasets)


def _old_dataset(content: _Bytes) -> str:
    content.integer()  # the number of chunks
    return content.take(content.integer()).decode() if not content.ended else ""


def write_imatrix(
    path: Path, squares: dict[str, NDArray[np.float32]], *, dataset: str, chunks: int, chunk_size: int
) -> None:
    """Writes an importance matrix as llama-imatrix does, whole or not at all.

    squares   weight name -> float32 [matrices, 1 + columns]: numbers of tokens, and sums of squared inputs
    dataset   the name of the text; `chunks` sequences of it with `chunk_size` tokens were used

    Raises UserError if the file cannot be written.
    """
    writer = GGUFWriter(None, "imatrix")
    writer.kv_data[0].pop("general.architecture")  # which llama-imatrix does not write
    writer.add_type("imatrix")
    writer.add_array(DATASETS, [dataset])
    writer.add_uint32(CHUNKS, chunks)
    writer.add_uint32(CHUNK_SIZE, chunk_size)
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(squares):
        arrays |= {name + SUMS: squares[name][:, 1:], name + COUNTS: squares[name][:, :1]}
    write_arrays(path, writer, arrays)
