"""Codebooks: which runs of consecutive codes may stand together in a row of a matrix.

A format with a codebook has scalar levels like any other, so a code still stands for one weight. But it stores the
index of a vector of 4 or 8 codes instead of the codes. What else it stores beside the index is one byte of flags for
each eight weights:

    signs   a bit per weight: whether its code is mirrored, K - 1 - code instead of code, for K levels
    lift    0 or 1: whether each of the eight codes is one higher than the vector's
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
EIGHT = 8
"""Weights that share a byte of flags."""
FAR = np.float32(1e4)
"""Targets are cut off here, in levels: what is farther away has the same nearest vector, and its square is finite."""
CHUNK = 1 << 11
"""Vectors whose distances to the whole codebook are computed at once. It bounds the memory."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """The vectors of a format, and how they may be changed.

    count    K, the number of levels
    vectors  uint8 [N, 4 or 8], the codes of each vector: in the upper half of the levels, or even ones if lifted
    even     whether the number of mirrored codes in each eight weights must be even
    lift     columns that share a lift, a multiple of eight; 0 if codes are mirrored instead
    """

    count: int
    vectors: Bytes
    even: bool = False
    lift: int = 0

    @property
    def width(self) -> int:
        """Number of weights of a vector."""
        return self.vectors.shape[1]

    @property
    def run(self) -> int:
        """Columns within which vectors depend on each other."""
        return self.lift or EIGHT

    def codes(self, indices: np.ndarray, flags: Bytes) -> Bytes:
        """Returns the codes uint8 [rows, columns] of vectors, given by their indices and flags.

        indices   integers [rows, columns / width]
        flags     uint8 [rows, columns / 8]
        """
        codes = self.vectors[indices].reshape(*flags.shape, EIGHT)
        if self.lift:
            codes = codes + flags[..., None]
        else:
            mirrored = np.unpackbits(flags[..., None], axis=-1, bitorder="little").astype(bool)
            codes = np.where(mirrored, np.uint8(self.count - 1) - codes, codes)
        return codes.reshape(len(flags), -1)

    def find(self, codes: Bytes) -> tuple[NDArray[np.int16], Bytes]:
        """Returns the indices and the flags of codes uint8 [rows, columns], as `codes` takes them.

        Raises ValueError if some codes are no vector, or if their signs or lifts may not stand together.
        """
        ranks, flags, alike = self._ranks(codes.reshape(len(codes), -1, EIGHT))
        indices = self._index_of[self._keys(ranks.reshape(len(codes), -1, self.width))]
        wrong = (indices < 0).reshape(*flags.shape, -1).any(axis=-1) | ~alike
        if np.any(wrong):
            row, eight = np.argwhere(wrong)[0]
            raise ValueError(
                f"The codes of row {row}, columns {EIGHT * eight} to {EIGHT * eight + EIGHT - 1}, are not in the "
                "codebook."
            )
        return indices, flags

    def nearest(self, target: NDArray[np.float32], levels: NDArray[np.float32]) -> Bytes:
        """Returns codes uint8 [rows, columns] whose levels are nearest to a target [rows, columns].

        Runs of columns are taken as wholes: the sum of squared differences is least.
        """
        target = np.clip(target, -FAR, FAR).reshape(-1, self.run // self.width, self.width)
        table, parts = levels[self.vectors], []
        for start in range(0, len(target), max(1, CHUNK * self.width // self.run)):
            chunk = target[start : start + max(1, CHUNK * self.width // self.run)]
            near = self._lifted if self.lift else self._mirrored
            parts.append(self.codes(*near(chunk, table, levels)))
        return np.concatenate(parts)

    def _ranks(self, codes: Bytes) -> tuple[Bytes, Bytes, NDArray[np.bool_]]:
        """Returns the ranks [..., 8] of codes within their vectors, the flags, and whether the flags are allowed."""
        half = self.count // 2
        if self.lift:
            lifts = codes & np.uint8(1)
            shared = lifts.reshape(len(codes), -1, self.lift)
            alike = np.repeat((shared == shared[..., :1]).all(axis=-1), self.lift // EIGHT, axis=-1)
            return codes >> np.uint8(1), lifts[..., 0], alike
        mirrored = codes < half
        ranks = np.where(mirrored, np.uint8(half - 1) - codes, codes - np.uint8(half))
        flags = np.packbits(mirrored, axis=-1, bitorder="little")[..., 0]
        return ranks, flags, ~((mirrored.sum(axis=-1) & 1).astype(bool) & self.even)

    def _keys(self, ranks: Bytes) -> NDArray[np.int64]:
        """Returns a number for each vector of ranks [..., width]."""
        bits = 16 // EIGHT if self.width == EIGHT else 3
        return (ranks.astype(np.int64) << bits * np.arange(self.width)).sum(axis=-1)

    @cached_property
    def _index_of(self) -> NDArray[np.int16]:
        """The index of each key, int16; -1 where no vector has the key."""
        table = np.full(1 << 16, -1, np.int16)
        ranks = self.vectors >> np.uint8(1) if self.lift else self.vectors - np.uint8(self.count // 2)
        table[self._keys(ranks)] = np.arange(len(self.vectors))
        return table

    def _mirrored(
        self, target: NDArray[np.float32], table: NDArray[np.float32], levels: NDArray[np.float32]
    ) -> tuple[np.ndarray, Bytes]:
        """Returns the indices [n, vectors of a run] and flags [n, 1] nearest to targets [n, vectors, width]."""
        size, negative = np.abs(target), target < 0
        distance = (table**2).sum(1) - 2 * size @ table.T
        indices = distance.argmin(-1)
        if self.even:
            odd = (negative.sum((1, 2)) & 1).astype(bool)
            self._flip_one(size[odd], table, distance[odd], indices_of := indices[odd], negative_of := negative[odd])
            indices[odd], negative[odd] = indices_of, negative_of
        return indices, np.packbits(negative.reshape(len(target), EIGHT), axis=-1, bitorder="little")

    def _flip_one(
        self, size: NDArray[np.float32], table: NDArray[np.float32], distance: NDArray[np.float32],
        indices: NDArray[np.int64], negative: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        """Changes one sign of each run in place, and the vector with it, so that the distance grows least.

        A changed sign adds 4 |target| |level| to the distance, so the cheapest weight of each vector is taken.
        """
        products = size[:, :, None] * table  # [n, vectors of a run, N, width]
        flipped = distance + 4 * products.min(-1)
        growth = flipped.min(-1) - distance.min(-1)
        vector, every = growth.argmin(-1), np.arange(len(size))
        chosen = flipped[every, vector].argmin(-1)
        indices[every, vector] = chosen
        weight = products[every, vector, chosen].argmin(-1)
        negative[every, vector, weight] ^= True

    def _lifted(
        self, target: NDArray[np.float32], table: NDArray[np.float32], levels: NDArray[np.float32]
    ) -> tuple[np.ndarray, Bytes]:
        """Returns the indices [n, vectors of a run] and flags [n, eights of a run] nearest to targets."""
        low = -2 * target @ table.T + (table**2).sum(1)
        lifted = levels[self.vectors + 1]
        high = -2 * target @ lifted.T + (lifted**2).sum(1)
        up = high.min(-1).sum(-1) < low.min(-1).sum(-1)
        indices = np.where(up[:, None], high.argmin(-1), low.argmin(-1))
        return indices, np.repeat(up[:, None], self.run // EIGHT, axis=1).astype(np.uint8)
