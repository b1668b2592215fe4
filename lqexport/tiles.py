"""Rows of a linear in tiles: what of it is computed at once does not change its bits.

Rows are independent given the second moments, so that as many are solved at once as there is memory for. But the last
bits of a matrix product depend on how many rows it has. So products have ROW_TILE rows, and what is solved at once is
whole tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
