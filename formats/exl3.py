"""EXL3, the format of ExLlamaV3: weights are walks through a trellis (`formats.trellis`) in a rotated, scaled basis.

The file holds the transposed matrix. For k inputs and n outputs, each raised to a multiple of 128, the planes are

    trellis  int16 [k / 16, n / 16, 16 K]   the ring of each tile of 16 x 16 weights
    suh      float16 [k]                    the scale and the sign of each input
    svh      float16 [n]                    the scale and the sign of each output

A matrix whose sides are no multiples of 128 has `suh` and `svh` of its own sides alone, and a padded `trellis`. The
writer pads both with zeros, which makes the weights of the padding zero. Planes whose `suh` and `svh` are padded as in
the file are those of the padded matrix.

Every arithmetic operation is rounded to float16 where ExLlamaV3 rounds when it decodes a whole layer (`Walks`). Its
kernels for generation round activations instead, and sum in float32.

Older files have the signs alone (`su`, `sv`), one bit for each input and output: `signs` reads them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.checks import check_layout
from lqexport.formats.codec import Planes, TrellisCodec
from lqexport.formats.trellis import BLOCK, CODEBOOKS, SIDE, Trellis, Walks, padded

WRITTEN_CODEBOOK = "mul1"
"""The codebook of the files that are written: its error is the least of the three, and half-integer K have no other."""
MARKERS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED}
"""The number that a file stores beside a tensor to name its codebook. `3inst` has none."""


class Exl3(TrellisCodec):
    """The codec `exl3:K` for K bits per weight, or `exl3:K-mcg` and `exl3:K-3inst` with the older codebooks."""

    block = 1

    def __init__(self, halves: int, codebook: str) -> None:
        """Makes the codec of `halves` / 2 bits per weight."""
        self.trellis = Trellis(halves, codebook)
        suffix = "" if codebook == WRITTEN_CODEBOOK else f"-{codebook}"
        self.name = f"exl3:{halves / 2:g}{suffix}"

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. Raises ValueError if the matrix is empty."""
        if rows < 1 or columns < 1:
            raise ValueError(f"{self.name} cannot hold an empty matrix, shape [{rows}, {columns}].")
        tiles = (padded(columns) // SIDE, padded(rows) // SIDE, self.trellis.words)
        return {
            "trellis": (np.dtype(np.int16), tiles),
            "suh": (np.dtype(np.float16), (columns,)),
            "svh": (np.dtype(np.float16), (rows,)),
        }

    def encode(self, walks: Walks) -> Planes:
        """See `codec.TrellisCodec`. Raises ValueError for walks of another trellis, for states that are no walks, and
        for weights that are not finite in float16."""
        if walks.trellis != self.trellis:
            raise ValueError(f"The walks are not those of {self.name}: they are of another trellis.")
        if not walks.trellis.walks(walks.states).all():
            raise ValueError(f"The states of {self.name} are no walks: some state does not follow from the one before.")
        planes = {"trellis": walks.trellis.pack(walks.states), "suh": walks.inputs, "svh": walks.outputs}
        check_layout(self, planes, len(walks.outputs), len(walks.inputs))
        _check_scales(self, walks)
        return planes

    def unpack(self, planes: Planes, columns: int) -> Walks:
        """See `codec.TrellisCodec`. Raises ValueError if the planes are not those of such a matrix."""
        check_layout(self, planes, len(planes.get("svh", ())), columns)
        return Walks(self.trellis, self.trellis.unpack(planes["trellis"]), planes["suh"], planes["svh"])

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """See `codec.Codec`."""
        return self.unpack(planes, columns).values()


EXL3 = {
    codec.name: codec
    for codebook in CODEBOOKS
    for halves in (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
    if halves % 2 == 0 or codebook == WRITTEN_CODEBOOK
    for codec in [Exl3(halves, codebook)]
}
"""The codecs by name: K = 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, and the integers with the older codebooks."""


def signs(bits: NDArray[np.int16]) -> NDArray[np.float16]:
    """Returns the signs that an older file's `su` or `sv` stands for, float16 [16 n], for int16 [n].

    Bit i of word w is channel 16 w + i, and a bit that is set means -1.
    """
    flags = np.unpackbits(np.ascontiguousarray(bits).view(np.uint8), bitorder="little")
    return (1 - 2 * flags.astype(np.float16)).astype(np.float16)


def _check_scales(codec: Exl3, walks: Walks) -> None:
    """Raises ValueError if a weight could be infinite, whatever the states are."""
    for name, scales in (("suh", walks.inputs), ("svh", walks.outputs)):
        if not np.isfinite(scales).all():
            raise ValueError(f"A number of {codec.name}'s {name} is infinite or not a number.")
    # Of 128 states each is at most the largest, so a rotated value is at most sqrt(128) times it; there are two.
    largest = np.abs(walks.trellis.table).max() * BLOCK**0.5
    most = largest * np.abs(walks.inputs).max().astype(np.float64)
    if max(most, most * BLOCK**0.5 * np.abs(walks.outputs).max().astype(np.float64)) > np.finfo(np.float16).max:
        raise ValueError(f"The scales of {codec.name} are too large: its weights may be infinite in float16.")
