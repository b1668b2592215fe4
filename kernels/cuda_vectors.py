"""The solver's inner loops for formats with a codebook on a GPU (vectors.cu): what `vectors` does, but for tensors.

In the shapes, R is rows, B columns of a block, G groups, N vectors, P first halves of vectors and K levels. Tensors are
float32 and contiguous unless stated otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.kernels import cuda, vectors
from lqexport.kernels.cuda_solve import MOST_COLUMNS, THREADS, Stored, blocks_of, feedback_results

SOURCE = "vectors.cu"
KERNELS = ["feedback_vectors", "refine_vectors", "fit_vectors"]
WARP = 32
WORK = 14 * vectors.EIGHT
"""Numbers of a row's work space."""
MOST_HEADS = 96
"""The most first halves that a codebook may have."""


@dataclass(frozen=True)
class Book:
    """A codebook on a device (see `vectors.Book`).

    vectors  uint8 [N, width]
    halves   [width / 2, P + N]
    starts   int32 [P + 1]
    levels   [K]
    """

    vectors: Tensor
    halves: Tensor
    starts: Tensor
    levels: Tensor
    even: bool
    lift: int
    shift: float

    def arguments(self) -> list[cuda.Argument]:
        """Returns the fields in the order of a kernel's last arguments."""
        sizes = [self.vectors.shape[1], self.halves.shape[1], len(self.starts) - 1, len(self.levels) - 1]
        return [self.vectors, self.halves, self.starts, self.levels, *sizes, int(self.even), self.lift, self.shift]

    def shared_bytes(self, numbers: int) -> int:
        """Returns the shared memory of a block each of whose warps works on as many numbers."""
        return 4 * (self.halves.numel() + THREADS // WARP * numbers)


def on_device(book: vectors.Book, device: torch.device) -> Book:
    """Returns a codebook on a device. Raises ValueError if it has more than MOST_HEADS first halves."""
    if len(book.starts) - 1 > MOST_HEADS:
        raise ValueError(f"A codebook has at most {MOST_HEADS} first halves of vectors, not {len(book.starts) - 1}.")
    halves = torch.from_numpy(book.halves)[: book.vectors.shape[1] // 2].contiguous()
    return Book(
        torch.from_numpy(book.vectors).to(device), halves.to(device),
        torch.from_numpy(book.starts.astype("int32")).to(device), torch.from_numpy(book.levels.copy()).to(device),
        book.even, book.lift, float(book.shift),
    )  # fmt: skip


def feedback_block(
    weights: Tensor, upper: Tensor, metrics: Tensor, weight: Tensor, inverse: Tensor, scale: Tensor, book: Book
) -> tuple[Tensor, Tensor]:
    """Returns the codes, uint8 [R, B], and the errors [R, B] of one block, bitwise equal to those of
    `vectors.feedback_block`.

    The arguments are those of `vectors.feedback_block`, but `weights` do not change. Raises ValueError if the block has
    more than MOST_COLUMNS columns.
    """
    rows, width = weights.shape
    codes, errors = feedback_results(weights)
    arguments = [
        weights, upper, metrics, weight, inverse, scale, rows, width, codes, errors, *book.arguments(),
    ]  # fmt: skip
    shared = book.shared_bytes(WORK + MOST_COLUMNS)
    cuda.launch(SOURCE, "feedback_vectors", blocks_of(rows, WARP), THREADS, arguments, shared)
    return codes, errors


def refine_block(
    values: Tensor, gradient: Tensor, hessian: Tensor, metrics: Tensor, codes: Tensor, group: int, scale: Stored,
    refit: bool, rounds: int, book: Book,
) -> None:  # fmt: skip
    """Makes rounds of coordinate descent over a block, in place; see `vectors.refine_block`."""
    rows, width = values.shape
    arguments = [
        values, gradient, hessian, metrics, codes, group, rows, width, *scale.arguments(), int(refit), rounds,
        *book.arguments(),
    ]  # fmt: skip
    cuda.launch(SOURCE, "refine_vectors", blocks_of(rows, WARP), THREADS, arguments, book.shared_bytes(WORK))


def fit_groups(weights: Tensor, weight: Tensor, cuts: Tensor, groups: int, book: Book) -> tuple[Tensor, Tensor]:
    """Returns every group's scale, and the sum of weight * level^2 under it, [R, G]; see `vectors.fit_groups`."""
    rows, columns = weights.shape
    scale, square = torch.empty(2, rows, groups, device=weights.device)
    arguments = [
        weights, weight, cuts, len(cuts), rows, groups, columns // groups, scale, square, *book.arguments(),
    ]  # fmt: skip
    cuda.launch(SOURCE, "fit_vectors", blocks_of(rows * groups, WARP), THREADS, arguments, book.shared_bytes(WORK))
    return scale, square
