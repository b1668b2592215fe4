"""Grids as torch tensors, for the solver on any device.

`TensorGrid` is the counterpart of `formats.codec.Grid`, and `Numbers` that of `formats.codec.Scales`. The method `of`
converts from the format's object, the method `numpy` back to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codebook import Codebook
from lqexport.formats.codec import BFLOAT16, FLOAT16, Grid, GridCodec, Rounding, ScaleFormat, Scales
from lqexport.grids.whole import in_units


@dataclass(frozen=True)
class Numbers:
    """Stored scales or offsets of a matrix with R rows and G groups of columns in a row.

    format   how the file stores them
    supers   float32 [R, G / span], each as `ScaleFormat` says: one for each superblock
    subs     int16 [R, G], one for each group
    """

    format: ScaleFormat
    supers: Tensor
    subs: Tensor

    def values(self) -> Tensor:
        """Returns the scales or offsets that the stored numbers stand for, float32 [R, G]."""
        return self.format.sign * self.supers.repeat_interleave(self.format.span, 1) * self.subs

    def clone(self) -> Numbers:
        return Numbers(self.format, self.supers.clone(), self.subs.clone())

    @staticmethod
    def of(scales: Scales, device: torch.device) -> Numbers:
        """Returns the counterpart of the format's object, on a device."""
        supers = torch.from_numpy(scales.supers.astype(np.float32)).to(device)
        return Numbers(scales.format, supers, torch.from_numpy(scales.subs).to(device))

    def numpy(self) -> Scales:
        return Scales(self.format, self.supers.cpu().numpy().astype(self.format.dtype), self.subs.cpu().numpy())


def half(values: Tensor) -> Tensor:
    """Returns float32 values rounded to the nearest float16, ties to even."""
    return values.half().float()


def rounded(values: Tensor, rounding: Rounding) -> Tensor:
    """Returns decoded values, float32, rounded as a grid's values are."""
    if rounding == Rounding.NONE:
        return values
    return values.bfloat16().float() if rounding == Rounding.BFLOAT_STEPS else half(values)


def rounded_step(products: Tensor, rounding: Rounding) -> Tensor:
    """Returns products of scale and level, float32, rounded as a grid's are before the offset is added."""
    return rounded(products, rounding) if rounding.by_steps else products


@dataclass(frozen=True)
class TensorGrid:
    """The values that the codes of a matrix [R, C] stand for: (scale * level[code] + offset) * whole.

    columns   C
    levels    float32 [1 or R, K], one table for all rows or one for each
    uniform   whether the levels are consecutive integers
    scale     None if each row has a table of its own
    offset    None if the format has no offset
    rounding  how values are rounded
    codebook  which vectors of codes may stand in a row; None if any codes may
    whole     as in `Grid`. Solvers work with grids that have 1, on weights divided by it
    """

    columns: int
    levels: Tensor
    uniform: bool
    scale: Numbers | None = None
    offset: Numbers | None = None
    rounding: Rounding = Rounding.NONE
    codebook: Codebook | None = None
    whole: float = 1.0

    @staticmethod
    def of(grid: Grid, device: torch.device) -> TensorGrid:
        """Returns the counterpart of the format's object, on a device."""
        levels = torch.from_numpy(np.ascontiguousarray(np.atleast_2d(grid.levels), np.float32)).to(device)
        scale = Numbers.of(grid.scale, device) if isinstance(grid.scale, Scales) else None
        offset = Numbers.of(grid.offset, device) if isinstance(grid.offset, Scales) else None
        return TensorGrid(grid.columns, levels, grid.uniform, scale, offset, grid.rounding, grid.codebook, grid.whole)

    @property
    def group(self) -> int:
        """Columns that share a scale: all columns if each row has one scale or a table."""
        return (self.scale.format.group if self.scale else 0) or self.columns

    def per_group(self, rows: int) -> tuple[Tensor, Tensor]:
        """Returns scales and offsets float32 [R, G]: ones and zeros if the format has none."""
        like = torch.ones(rows, self.columns // self.group, device=self.levels.device)
        scale = self.scale.values() if self.scale else like
        return scale, self.offset.values() if self.offset else torch.zeros_like(like)

    def values(self, codes: Tensor) -> Tensor:
        """Returns the decoded weights float32 [R, C] of codes uint8 [R, C]."""
        values = self.level_of(codes)
        if self.scale:
            products = values.unflatten(1, (-1, self.group)) * self.scale.values()[..., None]
            values = rounded_step(products, self.rounding)
        if self.offset:
            values = values + self.offset.values()[..., None]
        values = rounded(values.reshape(codes.shape), self.rounding)
        return values if self.whole == 1 else values * self.whole

    def level_of(self, codes: Tensor) -> Tensor:
        """Returns the level of each code, float32 [R, C]."""
        if self.uniform:  # several times faster than a lookup
            return codes.float() + self.levels[0, 0]
        if len(self.levels) == 1:
            return self.levels[0][codes.long()]
        return self.levels.gather(1, codes.long())

    def nearest(self, weights: Tensor) -> Tensor:
        """Returns the codes uint8 [R, C] of the values nearest to float32 weights [R, C]."""
        scale, offset = (values.repeat_interleave(self.group, 1) for values in self.per_group(len(weights)))
        target = (in_units(weights, self.whole) - offset) / torch.where(scale == 0, torch.inf, scale)
        if self.codebook is None:
            return nearest_level(target, self.levels, self.uniform)
        codes = self.codebook.nearest(target.cpu().numpy(), self.levels[0].cpu().numpy())
        return torch.from_numpy(codes.reshape(weights.shape)).to(weights.device)

    def ascending(self, codes: Tensor) -> tuple[TensorGrid, Tensor]:
        """Returns a grid and codes of the same values, with every row's table in ascending order, as formats need."""
        if len(self.levels) == 1:
            return self, codes
        levels, order = self.levels.sort(1)
        return replace(self, levels=levels), order.argsort(1).gather(1, codes.long()).to(torch.uint8)

    def numpy(self) -> Grid:
        levels = self.levels.cpu().numpy()
        scale = None if self.scale is None else self.scale.numpy()
        offset = None if self.offset is None else self.offset.numpy()
        shared = levels if scale is None else levels[0]
        return Grid(
            self.columns, shared, scale, offset, rounding=self.rounding, codebook=self.codebook, whole=self.whole
        )

    def runs(self, order: Tensor) -> list[tuple[slice, Tensor, TensorGrid]]:
        """Returns runs of columns in the order of solving, for `order` int64 [C]; here one run of all columns.

        Each run is the slice of `order` that it takes, the indices of its columns in a grid, int64, and that grid.
        """
        return [(slice(0, self.columns), order, self)]


def nearest_level(target: Tensor, levels: Tensor, uniform: bool) -> Tensor:
    """Returns the index uint8 [R, N] of the level nearest to each target [R, N], for levels [1 or R, K]."""
    if uniform:
        return (target.round() - levels[0, 0]).clamp(0, levels.shape[1] - 1).to(torch.uint8)
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).expand(len(target), -1).contiguous()
    return torch.searchsorted(middles, target.contiguous()).to(torch.uint8)


def shared_levels(codec: GridCodec, device: torch.device) -> tuple[Tensor, bool]:
    """Returns a format's levels float32 [1, K], and whether they are consecutive integers."""
    levels = np.asarray(codec.levels, np.float32)
    return torch.as_tensor(levels, device=device)[None], bool(np.all(np.diff(levels) == 1))


def round_half(values: Tensor) -> Tensor:
    """Returns float32 values rounded to float16; values beyond its range become its largest number."""
    return values.clamp(FLOAT16.least, FLOAT16.most).half().float()


def round_super(values: Tensor, format: ScaleFormat) -> Tensor:
    """Returns float32 values rounded to the nearest float that the format stores."""
    floats = format.floats.fitted
    if floats == BFLOAT16:
        return values.bfloat16().float()
    if floats == FLOAT16:
        return round_half(values)
    values = values.clamp(floats.least, floats.most)
    positive = values.abs().clamp_min(2.0**floats.lowest)
    unit = positive / positive.frexp().mantissa * 2.0 ** (-1 - floats.mantissa)  # not by exp2, which some devices round
    return ((values / unit).round() * unit).clamp_max(floats.most)


def round_sub(values: Tensor, format: ScaleFormat) -> Tensor:
    """Returns float32 values rounded to the nearest integer that a group of the format stores, as float32."""
    if format.step > 1:
        values = format.low + format.step * ((values - format.low) / format.step).round()
    return values.round().clamp(format.low, format.high)
