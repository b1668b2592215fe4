"""Rows of a linear in tiles: what of it is computed at once does not change its bits.

Rows are independent given the second moments, so that as many are solved at once as there is memory for. But the last
bits of a matrix product depend on how many rows it has. So products have ROW_TILE rows, and what is solved at once is
whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor

from lqexport.errors import UserError

ROW_TILE = 2048
"""Rows of a product. Fixed: the last bits depend on it."""

T = TypeVar("T")


def tiles(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of ROW_TILE rows each; the last may have fewer."""
    return matrix.split(ROW_TILE)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, tile by tile."""
    parts = [tile @ right for tile in tiles(left)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def whole_tiles(rows: int) -> int:
    """As many rows as fit in `rows` in whole tiles, one tile at least."""
    return max(ROW_TILE, rows // ROW_TILE * ROW_TILE)


def dealt(rows: Sequence[int], count: int) -> list[list[tuple[int, slice]]]:
    """Matrices of so many rows, dealt out to `count` processes tile by tile, in their order: for each process numbers
    of matrices, and the rows that it gets of them."""
    units = [(number, start) for number, each in enumerate(rows) for start in range(0, each, ROW_TILE)]
    ends = [-(-len(units) * process // count) for process in range(count + 1)]
    found = []
    for first, end in pairwise(ends):
        runs = groupby(units[first:end], key=itemgetter(0))
        starts = [(number, [start for _, start in run]) for number, run in runs]
        found.append([(number, slice(some[0], min(some[-1] + ROW_TILE, rows[number]))) for number, some in starts])
    return found


def in_chunks(work: Callable[[slice], T], count: int, rows: int) -> Iterator[T]:
    """What `work` returns for `rows` of `count` rows at once, whole tiles. Where memory runs out, half as many at once
    from there on; raises UserError where that is less than a tile."""
    start = 0
    while start < count:
        chunk = slice(start, min(start + rows, count))
        try:
            done = work(chunk)
        except torch.OutOfMemoryError as error:
            if rows <= ROW_TILE:
                raise UserError(
                    f"Out of memory with {rows} rows of a linear, the fewest that are solved at once. Give a smaller "
                    "--device-memory, so that less is kept on the device beside them, or take a larger device."
                ) from error
            rows = whole_tiles(min(rows, count) // 2)
        else:
            yield done
            start = chunk.stop
            continue
        torch.cuda.empty_cache()  # outside of the handler, whose traceback holds what `work` had made
