"""Trellis codes: a tile of 16 x 16 weights is a walk through the 65536 states of a shift register of 16 bits.

A tile has 256 positions. Position i takes D(i) new bits:

    state(i) = ((state(i - 1) << D(i)) | new bits) & 0xFFFF        state(-1) = state(255)

so a tile of K bits per weight is a ring of 256 K bits, and a state is the last 16 bits of the ring up to its
position. Any ring of bits is a walk. A codebook gives the value of each state. D(i) is K; for half-integer K it is
K - 0.5 at even positions and K + 0.5 at odd ones.

The ring is stored in 32-bit words, the first bit of the ring highest, and the words as pairs of int16, the lower half
first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.uint16]
POSITIONS = 256
"""Weights of a tile."""
STATES = 1 << 16
SIDE = 16
"""Rows and columns of a tile."""
BLOCK = 128
"""Rows or columns that a rotation mixes."""
CODEBOOKS = ("mul1", "mcg", "3inst")
DISTORTION = {
    1.0: 0.271, 1.5: 0.137, 2.0: 0.0683, 2.5: 0.0346, 3.0: 0.0174, 3.5: 0.00882, 4.0: 0.00445, 5.0: 0.00115,
    6.0: 0.000298, 7.0: 0.000079, 8.0: 0.0000203,
}  # fmt: skip
"""K -> mean squared error that a search leaves of Gaussian weights of unit variance (bench/exl3_distortion.py)."""


def tile_order() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the row (input) and the column (output) of each position within its tile, int64 [256] each.

    It is the order in which the tensor cores of a GPU take a tile.
    """
    position = np.arange(POSITIONS)
    run, place = position // 8, position % 8
    return 2 * (run % 4) + place % 2 + 8 * (place // 2 % 2), run // 4 + 8 * (place // 4)


ROW, COLUMN = tile_order()
"""The row and the column of each position within its tile."""


def rotated(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns a matrix [128 n, columns], float32, whose runs of 128 rows are multiplied by the Hadamard matrix H.

    H[i, j] = (-1)^popcount(i & j) / sqrt(128) is its own inverse. The sums are made in seven steps of one addition
    each, so their rounding is the same on every machine.
    """
    result, columns = matrix.astype(np.float32), matrix.shape[1]
    half = 1
    while half < BLOCK:
        pairs = result.reshape(-1, 2, half * columns)
        first, second = pairs[:, 0], pairs[:, 1]
        sums = first + second
        np.subtract(first, second, out=second)
        first[:] = sums
        half *= 2
    result *= np.float32(1 / np.sqrt(BLOCK))
    return result


def padded(size: int) -> int:
    """Returns a number of rows or columns, raised to a multiple of 128."""
    return -(-size // BLOCK) * BLOCK


@dataclass(frozen=True)
class Trellis:
    """The walks of K bits per weight, and what their states stand for.

    halves     2 K
    codebook   the name of the function from a state to its value, one of CODEBOOKS
    """

    halves: int
    codebook: str

    @cached_property
    def new_bits(self) -> NDArray[np.int64]:
        """The bits D(i) that each position takes, int64 [256]."""
        return self.halves // 2 + (np.arange(POSITIONS) % 2) * (self.halves % 2)

    @property
    def words(self) -> int:
        """The int16 numbers of a tile: 16 K."""
        return 8 * self.halves

    @cached_property
    def table(self) -> NDArray[np.float32]:
        """The value of each state, float32 [65536], each exactly a float16."""
        return _table(self.codebook)

    def walks(self, states: States) -> NDArray[np.bool_]:
        """Returns whether runs of states [..., 256] are walks of this trellis, bool [...]."""
        kept = (states & self._masks).astype(np.uint16)
        return (np.roll(kept, 1, axis=-1) == states >> self.new_bits.astype(np.uint16)).all(axis=-1)

    @cached_property
    def _masks(self) -> States:
        """The bits of each position's state that the next position keeps, uint16 [256]."""
        return ((1 << (16 - np.roll(self.new_bits, -1))) - 1).astype(np.uint16)

    def pack(self, states: States) -> NDArray[np.int16]:
        """Returns the rings of walks, int16 [..., 16 K], for states [..., 256]."""
        position = np.repeat(np.arange(POSITIONS), self.new_bits)
        ends = np.cumsum(self.new_bits)
        place = (ends[position] - 1 - np.arange(len(position))).astype(np.uint16)
        bits = (states[..., position] >> place).astype(np.uint8) & np.uint8(1)
        return np.packbits(bits, axis=-1).view(">u4").astype("<u4").view(np.int16)

    def unpack(self, rings: NDArray[np.int16]) -> States:
        """Returns the states of rings, uint16 [..., 256], for int16 [..., 16 K]."""
        words = np.ascontiguousarray(rings).view("<u4").astype(np.uint64)
        pairs = words << np.uint64(32) | np.roll(words, -1, axis=-1)
        starts = (np.cumsum(self.new_bits) - 16) % (POSITIONS * self.halves // 2)
        shifts = (48 - starts % 32).astype(np.uint64)
        return (pairs[..., starts // 32] >> shifts).astype(np.uint16)


@dataclass(frozen=True, eq=False)
class Walks:
    """A matrix as a trellis format stores it: weights are walks in a rotated and scaled basis.

    trellis   which walks there are
    states    uint16 [inputs / 16, outputs / 16, 256], of each tile; inputs and outputs are padded to multiples of 128
    inputs    float16 [columns], the scale and the sign of each input
    outputs   float16 [rows], the scale and the sign of each output

    With C the values of the states, H the Hadamard matrix of 128 on each run of 128 inputs or outputs, and the
    paddings cut off, the matrix is

        weight = (diag(inputs) H C H diag(outputs))^T

    and every product is rounded to float16, as in ExLlamaV3 when it decodes a whole layer.
    """

    trellis: Trellis
    states: States
    inputs: NDArray[np.float16]
    outputs: NDArray[np.float16]

    def codes(self) -> NDArray[np.float32]:
        """Returns the values of the states, float32 [padded inputs, padded outputs], each exactly a float16."""
        down, across, _ = self.states.shape
        tiles = np.empty((down, SIDE, across, SIDE), np.float32)
        tiles[:, ROW, :, COLUMN] = np.moveaxis(self.trellis.table[self.states], -1, 0)
        return tiles.reshape(down * SIDE, across * SIDE)

    def values(self) -> NDArray[np.float32]:
        """Returns the weights, float32 [rows, columns]. Those beyond float16 are infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            mixed = _half(rotated(self.codes()))[: len(self.inputs)]
            scaled = _half(mixed * self.inputs.astype(np.float32)[:, None])
            mixed = _half(rotated(np.ascontiguousarray(scaled.T)))[: len(self.outputs)]
            return _half(mixed * self.outputs.astype(np.float32)[:, None])


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.astype(np.float16).astype(np.float32)


def _table(codebook: str) -> NDArray[np.float32]:
    states = np.arange(STATES, dtype=np.uint32)
    if codebook == "mul1":
        mixed = states * np.uint32(0x83DCD12D)
        total = mixed.view(np.uint8).reshape(-1, 4).sum(axis=1)
        step, shift = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
        return ((1024 + total) * step + shift).astype(np.float16).astype(np.float32)
    mixed = states * np.uint32(0xCBAC1FED)
    if codebook == "3inst":
        mixed = states * np.uint32(89226354) + np.uint32(64248484)
    mixed = mixed & np.uint32(0x8FFF8FFF) ^ np.uint32(0x3B603B60)
    return mixed.view(np.float16).astype(np.float32).reshape(-1, 2).sum(axis=1).astype(np.float16).astype(np.float32)
