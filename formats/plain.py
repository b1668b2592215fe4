"""GGUF's unquantized types. The plane `blocks` holds the bytes of each weight, little-endian."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats import bfloat16
from lqexport.formats.checks import check_planes, check_shape
from lqexport.formats.codec import PlainCodec, Planes


class TooLarge(ValueError):
    """A finite weight would become infinite in a type."""


class _Plain(PlainCodec):
    """A type that stores each weight as one number.

    stored   the number's little-endian dtype in the file
    """

    block = 1
    stored: np.dtype

    def layout(self, rows: int, columns: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """See `codec.Codec`. The plane is `blocks`, uint8 [rows, bytes of a row]. Raises ValueError if the matrix is
        empty."""
        check_shape(self, rows, columns)
        return {"blocks": (np.dtype(np.uint8), (rows, columns * self.stored.itemsize))}

    def encode_values(self, weights: NDArray[np.float32]) -> Planes:
        """Packs weights float32 [rows, columns]. Each is rounded to nearest, ties to even.

        Raises TooLarge if a finite weight would become infinite, and ValueError for another dtype or number of
        dimensions.
        """
        if weights.dtype != np.float32 or weights.ndim != 2:
            raise ValueError(f"{self.name} stores float32 [rows, columns], not {weights.dtype} {list(weights.shape)}.")
        rounded = np.ascontiguousarray(self._round(weights))
        planes = {"blocks": rounded.view(np.uint8)}
        check_planes(self, planes, weights.shape[1])
        if np.any(np.isinf(self._widen(rounded)) & np.isfinite(weights)):
            raise TooLarge(f"The weight {_largest(weights)} is too large for {self.name}: it would become infinite.")
        return planes

    def decode(self, planes: Planes, columns: int) -> NDArray[np.float32]:
        """Returns the stored weights exactly, float32 [rows, columns]. Raises ValueError if the planes are not those of
        such a matrix."""
        check_planes(self, planes, columns)
        return self._widen(np.ascontiguousarray(planes["blocks"]).view(self.stored))

    def _round(self, weights: NDArray[np.float32]) -> np.ndarray:
        with np.errstate(over="ignore"):  # encode_values reports an overflow
            return weights.astype(self.stored)

    def _widen(self, stored: np.ndarray) -> NDArray[np.float32]:
        return stored.astype(np.float32)


def _largest(weights: NDArray[np.float32]) -> np.float32:
    finite = weights[np.isfinite(weights)]
    return finite[np.argmax(np.abs(finite))]


class F32(_Plain):
    """IEEE single precision, 4 bytes: the weight itself."""

    name = "gguf:F32"
    stored = np.dtype("<f4")


class NormPlusOne(F32):
    """The weight plus 1 in single precision, for the norms of Gemma.

    Hugging Face's Gemma multiplies by the norm's weight plus 1; llama.cpp multiplies by the stored number. The sum is
    rounded once, so a weight near 0 loses its lowest bits.
    """

    name = "gguf-norm:F32"

    def _round(self, weights: NDArray[np.float32]) -> np.ndarray:
        return weights + np.float32(1)

    def _widen(self, stored: np.ndarray) -> NDArray[np.float32]:
        return stored.astype(np.float32) - np.float32(1)


class Decay(F32):
    """-exp(weight) in single precision, for the logarithms of decays (`A_log`) of state space models.

    Hugging Face's models compute -exp(A_log); llama.cpp multiplies by the stored number. Both roundings move the
    weight by a few units of its last place at most.
    """

    name = "gguf-decay:F32"

    def _round(self, weights: NDArray[np.float32]) -> np.ndarray:
        with np.errstate(over="ignore"):  # encode_values reports an overflow
            return -np.exp(weights.astype(np.float64)).astype(np.float32)

    def _widen(self, stored: np.ndarray) -> NDArray[np.float32]:
        with np.errstate(divide="ignore", invalid="ignore"):  # a reader reports what is not finite
            return np.log(-stored.astype(np.float64)).astype(np.float32)


class Whole(_Plain):
    """A whole number as a 4-byte integer, for tables of numbers such as those of experts.

    Every whole number up to 2^24 is exact, since float32 holds it exactly.
    """

    name = "gguf-whole:I32"
    stored = np.dtype("<i4")

    def _round(self, weights: NDArray[np.float32]) -> np.ndarray:
        """Raises ValueError if a weight is no whole number, or above 2^24."""
        if not np.all((weights == np.rint(weights)) & (np.abs(weights) <= 1 << 24)):
            raise ValueError(f"{self.name} stores whole numbers up to 2^24.")
        return weights.astype(self.stored)


class F16(_Plain):
    """IEEE half precision, 2 bytes."""

    name = "gguf:F16"
    stored = np.dtype("<f2")


class BF16(_Plain):
    """The upper 2 bytes of the IEEE single precision number."""

    name = "gguf:BF16"
    stored = np.dtype("<u2")

    def _round(self, weights: NDArray[np.float32]) -> np.ndarray:
        return bfloat16.to_bits(weights)

    def _widen(self, stored: np.ndarray) -> NDArray[np.float32]:
        return bfloat16.of_bits(stored)


PLAIN = (F32(), NormPlusOne(), Decay(), Whole(), F16(), BF16())
