"""Divides the rows of a linear into tiles, so that results do not depend on how many rows are solved at once.

Rows are independent given the Hessian, so as many rows are solved at once as memory allows. But the last bits of a
matrix product depend on its number of rows. So every product has ROW_TILE rows, and whole tiles are solved at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from lqexport.errors import UserError
from lqexport.runtime.products import times_transposed

ROW_TILE = 2048
"""The number of rows of a product. It never changes, since the last bits of results depend on it."""

T = TypeVar("T")


def tiles(matrix: Tensor) -> tuple[Tensor, ...]:
    """Returns views of ROW_TILE rows each; the last may have fewer."""
    return matrix.split(ROW_TILE)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right, computed one tile of `left` at a time."""
    products = [tile @ right for tile in tiles(left)]
    return products[0] if len(products) == 1 else torch.cat(products)


def product_transposed(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right^T, computed one tile of `left` at a time."""
    products = [times_transposed(tile, right) for tile in tiles(left)]
    return products[0] if len(products) == 1 else torch.cat(products)


def whole_tiles(rows: int) -> int:
    """Returns `rows` rounded down to whole tiles, and at least one tile."""
    return max(ROW_TILE, rows // ROW_TILE * ROW_TILE)


def dealt(rows: Sequence[int], count: int) -> list[list[tuple[int, slice]]]:
    """Divides the tiles of some matrices among `count` processes, in order and as evenly as possible.

    rows   the number of rows of each matrix

    Returns for each process a list of (index of a matrix, its rows for this process).
    """
    all_tiles = [(number, start) for number, row_count in enumerate(rows) for start in range(0, row_count, ROW_TILE)]
    ends = [-(-len(all_tiles) * process // count) for process in range(count + 1)]
    shares = []
    for first, end in pairwise(ends):
        runs = groupby(all_tiles[first:end], key=itemgetter(0))
        starts = [(number, [start for _, start in run]) for number, run in runs]
        shares.append([(number, slice(each[0], min(each[-1] + ROW_TILE, rows[number]))) for number, each in starts])
    return shares


def in_chunks(work: Callable[[slice], T], count: int, rows: int) -> Iterator[T]:
    """Yields the results of `work` for `count` rows, `rows` of them at a time.

    work   takes the slice of rows to process
    rows   a multiple of ROW_TILE

    If the device runs out of memory, the rows are tried again, half as many at a time from then on, in whole tiles.
    Raises UserError if one tile is already too much.
    """
    start = 0
    while start < count:
        chunk = slice(start, min(start + rows, count))
        try:
            result = work(chunk)
        except torch.OutOfMemoryError as error:
            if rows <= ROW_TILE:
                raise UserError(
                    f"Out of memory with {rows} rows of a linear, the fewest that are solved at once. Give a smaller "
                    "--device-memory, so that less is kept on the device beside them, or take a larger device."
                ) from error
            rows = whole_tiles(min(rows, count) // 2)
        else:
            yield result
            start = chunk.stop
            continue
        torch.cuda.empty_cache()  # after the handler, whose traceback keeps the tensors of `work` alive
