"""Checks that every codec makes before it packs or unpacks. Each failure is a ValueError of one sentence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lqexport.formats.codec import FLOAT16, WHOLE, Codec, Grid, GridCodec, GroupNumbers, Planes, ScaleFormat, Scales


def check_shape(codec: Codec, rows: int, columns: int) -> None:
    """Raises ValueError if `codec` cannot hold a matrix [rows, columns]."""
    if rows < 1 or columns < 1:
        raise ValueError(f"{codec.name} cannot hold an empty matrix, shape [{rows}, {columns}].")
    if columns % codec.block:
        raise ValueError(f"{codec.name} holds rows of a multiple of {codec.block} weights, not {columns}.")


def check_planes(codec: Codec, planes: Planes, columns: int) -> int:
    """Returns the number of rows in `planes`. Raises ValueError if they do not hold a matrix of `columns` columns."""
    rows = next((len(plane) for name, plane in planes.items() if name != WHOLE), 0)
    check_layout(codec, planes, rows, columns)
    return rows


def check_layout(codec: Codec, planes: Planes, rows: int, columns: int) -> None:
    """Raises ValueError if the planes' names, dtypes or shapes are not those of a matrix [rows, columns]."""
    expected = codec.layout(rows, columns)
    if sorted(expected) != sorted(planes):
        raise ValueError(f"{codec.name} has the planes {', '.join(expected)}, not {', '.join(planes) or 'none'}.")
    for name, (dtype, shape) in expected.items():
        plane = planes[name]
        if plane.dtype != dtype or plane.shape != shape:
            raise ValueError(
                f"Plane {name} of {codec.name} with {columns} columns must be {dtype} {list(shape)}, "
                f"not {plane.dtype} {list(plane.shape)}."
            )


def check_grid(codec: GridCodec, grid: Grid, codes: NDArray[np.uint8]) -> None:
    """Raises ValueError if `codec` cannot store `grid` and `codes` exactly."""
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"{codec.name} packs codes that are uint8 [rows, columns], not {codes.dtype} {codes.shape}.")
    rows, columns = codes.shape
    check_shape(codec, rows, columns)
    if grid.columns != columns:
        raise ValueError(f"The grid has {grid.columns} columns and the codes {columns}.")
    if grid.rounding != codec.rounding:
        raise ValueError(f"The grid is not one of {codec.name}: its values are rounded otherwise.")
    check_whole(codec, grid)
    if (largest := int(codes.max())) >= codec.level_count:
        raise ValueError(f"Code {largest} is too large: {codec.name} has {codec.level_count} levels.")
    _check_levels(codec, grid.levels, rows)
    if grid.codebook is not codec.codebook:
        raise ValueError(f"The grid is not one of {codec.name}: it has another codebook.")
    _check_scales(codec, "scale", codec.scale, grid.scale, codes.shape)
    _check_scales(codec, "offset", codec.offset, grid.offset, codes.shape)


def check_whole(codec: GridCodec, grid: Grid) -> None:
    """Raises ValueError if `codec` cannot store the number by which all values of a grid are multiplied."""
    if grid.whole != 1 and not codec.has_whole:
        raise ValueError(f"The grid is not one of {codec.name}: it has a further scale for the whole matrix.")
    if not np.isfinite(grid.whole) or np.float32(grid.whole) != grid.whole:
        raise ValueError(f"The scale of a whole matrix of {codec.name} must be a finite float32, not {grid.whole}.")


def _check_levels(codec: GridCodec, levels: NDArray[np.float32], rows: int) -> None:
    if codec.levels is not None:
        if levels.dtype != np.float32 or not np.array_equal(levels, codec.levels):
            raise ValueError(f"The grid is not one of {codec.name}: it has other levels.")
        return
    if levels.dtype != np.float32 or levels.shape != (rows, codec.level_count):
        raise ValueError(
            f"{codec.name} has a table float32 [{rows}, {codec.level_count}], not {levels.dtype} {list(levels.shape)}."
        )
    if not np.isfinite(levels).all() or np.any(np.abs(levels) > np.finfo(np.float16).max):
        raise ValueError(f"A table of {codec.name} must be finite in float16.")
    if not np.array_equal(levels.astype(np.float16), levels):
        raise ValueError(f"A table of {codec.name} is stored in float16: round it before choosing codes.")
    if np.any(levels[:, 1:] < levels[:, :-1]):
        raise ValueError(f"A table of {codec.name} must ascend.")


def _check_scales(
    codec: GridCodec, number: str, expected: ScaleFormat | None, scales: GroupNumbers | None, shape: tuple[int, ...]
) -> None:
    """Checks a grid's scales or offsets against the codec's format. `number` is "scale" or "offset"; `shape` is the
    matrix's."""
    if scales is None and expected is None:
        return
    if not isinstance(scales, Scales) or expected is None or scales.format != expected:
        raise ValueError(f"The grid is not one of {codec.name}: it has another {number} format.")
    rows, groups = shape[0], expected.groups(shape[1])
    arrays: dict[str, tuple[np.ndarray, type[np.generic] | np.dtype, tuple[int, ...]]] = {
        "supers": (scales.supers, expected.dtype, (rows, groups // expected.span)),
        "subs": (scales.subs, np.int16, (rows, groups)),
    }
    for name, (array, dtype, expected_shape) in arrays.items():
        if array.dtype != dtype or array.shape != expected_shape:
            raise ValueError(
                f"The {number} {name} of {codec.name} must be {np.dtype(dtype)} {list(expected_shape)}, "
                f"not {array.dtype} {list(array.shape)}."
            )
    if not np.isfinite(scales.supers).all():
        raise ValueError(f"A {number} of {codec.name} is infinite or not a number.")
    if expected.floats != FLOAT16 and not expected.floats.holds(scales.supers).all():
        raise ValueError(f"A {number} of {codec.name} is not among the {expected.floats}.")
    if scales.subs.min() < expected.low or scales.subs.max() > expected.high:
        raise ValueError(f"The {number} subs of {codec.name} must lie in {expected.low}..{expected.high}.")
    if np.any((scales.subs - expected.low) % expected.step):
        raise ValueError(f"The {number} subs of {codec.name} must be {expected.low} and steps of {expected.step} more.")
