"""Sections as torch tensors, the counterpart of `formats.codec.Sections`.

A matrix in sections stores its columns in an order of its own, in runs that have a grid each. A run of EXL2 has scales
under maxima that all rows share. GPTQ's layout is one run, with scales and integer zero points.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lqexport.formats import gptq
from lqexport.formats.codec import FLOAT16, Grid, Rounding, ScaleFormat, Scales, Sections
from lqexport.formats.exl2 import SquaredScales
from lqexport.grids.grid import Numbers, TensorGrid, half


def squared_scale(maxima: Tensor, subs: Tensor) -> Tensor:
    """Returns the scales (s + 1)^2 * (M / 256) that ExLlamaV2 computes from maxima M and scale codes s.

    The arguments broadcast. The scales are float32, rounded to float16 wherever ExLlamaV2 rounds. docs/solver.md has a
    worked example ("EXL2's scales").
    """
    return half((subs.float() + 1).square() * half(maxima / 256))


def storable(maxima: Tensor, bits: int) -> Tensor:
    """Returns EXL2's maxima rounded to float16, and limited so that no weight becomes infinite."""
    return half(maxima.clamp(0, FLOAT16.most / 2 ** (bits - 1)))


def storable_scales(scales: Tensor) -> Tensor:
    """Returns GPTQ's scales rounded to float16, and limited so that no weight becomes infinite."""
    return half(scales.clamp(-gptq.MOST_SCALE, gptq.MOST_SCALE))


@dataclass(frozen=True)
class SquaredSection:
    """A run of EXL2's groups with their stored numbers, the counterpart of `formats.exl2.SquaredScales`.

    levels   float32 [1, K]
    group    columns in a group
    maxima   float32 [G], each exactly a float16, shared by all rows
    subs     scale codes, int16 [R, G]
    """

    levels: Tensor
    group: int
    maxima: Tensor
    subs: Tensor

    @property
    def columns(self) -> int:
        return self.group * len(self.maxima)

    def grid(self) -> TensorGrid:
        """Returns the run as a grid whose scales are those that ExLlamaV2 computes."""
        scales = squared_scale(self.maxima, self.subs)
        numbers = Numbers(ScaleFormat(self.group), scales, torch.ones_like(self.subs))
        return TensorGrid(self.columns, self.levels, True, numbers, rounding=Rounding.HALF)

    def smooth(self) -> TensorGrid:
        """Returns the run as a grid in which nothing is rounded, so that values have derivatives by the maxima."""
        scales = (self.subs.float() + 1).square() * (self.maxima / 256)
        numbers = Numbers(ScaleFormat(self.group), scales, torch.ones_like(self.subs))
        return TensorGrid(self.columns, self.levels, True, numbers)

    def stored(self) -> SquaredSection:
        """Returns a copy whose numbers are rounded as the file will hold them."""
        return replace(self, maxima=storable(self.maxima, self.levels.shape[1].bit_length() - 1))

    @property
    def numbers(self) -> Tensor:
        """The numbers that the file stores as float16: the maxima."""
        return self.maxima

    def with_numbers(self, new: Tensor) -> SquaredSection:
        return replace(self, maxima=new)

    def part(self, groups: slice) -> SquaredSection:
        """Returns a section with some of the groups."""
        return replace(self, maxima=self.maxima[groups], subs=self.subs[:, groups].contiguous())

    def clone(self) -> SquaredSection:
        return replace(self, maxima=self.maxima.clone(), subs=self.subs.clone())

    def numpy(self) -> Grid:
        scale = SquaredScales(self.maxima.cpu().numpy().astype(np.float16), self.subs.cpu().numpy())
        return Grid(self.columns, self.levels[0].cpu().numpy(), scale, rounding=Rounding.HALF)


@dataclass(frozen=True)
class ZeroSection:
    """All groups of a matrix in GPTQ's layout with their stored numbers.

    zero     how the file stores zero points; its `low` and `high` are their range
    scales   float32 [R, G], each exactly a float16
    zeros    zero points, int16 [R, G]
    """

    columns: int
    zero: ScaleFormat
    scales: Tensor
    zeros: Tensor

    @property
    def group(self) -> int:
        """Columns in a group."""
        return self.columns // self.scales.shape[1]

    def smooth(self) -> TensorGrid:
        """Returns the section as a grid whose values are not rounded, so that they have derivatives by the scales."""
        return replace(self.grid(), rounding=Rounding.NONE)

    def stored(self) -> ZeroSection:
        """Returns a copy whose numbers are rounded as the file will hold them."""
        return replace(self, scales=storable_scales(self.scales))

    @property
    def numbers(self) -> Tensor:
        """The numbers that the file stores as float16: the scales."""
        return self.scales

    def with_numbers(self, new: Tensor) -> ZeroSection:
        return replace(self, scales=new.view_as(self.scales))

    def part(self, groups: slice) -> ZeroSection:
        """Returns a section with some of the groups."""
        scales, zeros = self.scales[:, groups].contiguous(), self.zeros[:, groups].contiguous()
        return replace(self, columns=scales.shape[1] * self.group, scales=scales, zeros=zeros)

    def grid(self) -> TensorGrid:
        """Returns the section as a grid."""
        levels = torch.from_numpy(gptq.LEVELS).to(self.scales.device)[None]
        scale = Numbers(replace(self.zero, low=1, high=1, sign=1), self.scales, torch.ones_like(self.zeros))
        return TensorGrid(
            self.columns, levels, True, scale, Numbers(self.zero, self.scales, self.zeros), rounding=Rounding.HALF
        )

    def clone(self) -> ZeroSection:
        return replace(self, scales=self.scales.clone(), zeros=self.zeros.clone())

    def numpy(self) -> Grid:
        return self.grid().numpy()


Section = SquaredSection | ZeroSection


def _section_of(grid: Grid, device: torch.device) -> Section:
    if isinstance(grid.scale, SquaredScales):
        levels = torch.from_numpy(np.atleast_2d(grid.levels)).to(device)
        maxima = torch.from_numpy(grid.scale.maxima.astype(np.float32)).to(device)
        subs = torch.from_numpy(np.ascontiguousarray(grid.scale.subs)).to(device)
        return SquaredSection(levels, grid.columns // len(maxima), maxima, subs)
    assert isinstance(grid.scale, Scales)
    assert isinstance(grid.offset, Scales)
    scales, zeros = Numbers.of(grid.scale, device), Numbers.of(grid.offset, device)
    return ZeroSection(grid.columns, grid.offset.format, scales.supers, zeros.subs)


@dataclass(frozen=True)
class TensorSections:
    """A matrix in sections.

    order      int64 [C]: stored column i is column order[i] of the matrix
    sections   runs of consecutive stored columns, from the first to the last
    """

    order: Tensor
    sections: tuple[Section, ...]

    @staticmethod
    def of(grid: Sections, device: torch.device) -> TensorSections:
        """Returns the counterpart of the format's object, on a device."""
        sections = tuple(_section_of(run_grid, device) for run_grid in grid.grids)
        return TensorSections(torch.from_numpy(grid.order).to(device), sections)

    def slices(self) -> list[slice]:
        """Returns the slice of stored columns of each section."""
        ends = list(itertools.accumulate(section.columns for section in self.sections))
        return [slice(end - section.columns, end) for end, section in zip(ends, self.sections, strict=True)]

    def runs(self, order: Tensor) -> list[tuple[slice, Tensor, TensorGrid]]:
        """Returns runs of columns in the order of solving, as `TensorGrid.runs` does.

        With several sections, columns must be solved in the order in which they are stored.
        """
        if len(self.sections) == 1:
            return self.sections[0].grid().runs(self.order.argsort()[order])
        assert order is self.order
        pairs = zip(self.slices(), self.sections, strict=True)
        return [(where, torch.arange(section.columns, device=order.device), section.grid()) for where, section in pairs]

    def stored_values(self, codes: Tensor) -> Tensor:
        """Returns the decoded weights float32 [R, C] of codes uint8 [R, C], both in stored order."""
        return torch.cat([grid.values(codes[:, where]) for where, _, grid in self.runs(self.order)], dim=1)

    def values(self, codes: Tensor) -> Tensor:
        """Returns the decoded weights float32 [R, C] of codes uint8 [R, C], both in the matrix's order."""
        return self.stored_values(codes[:, self.order])[:, self.order.argsort()]

    def nearest(self, weights: Tensor) -> Tensor:
        """Returns codes uint8 [R, C] of the values nearest to float32 weights [R, C], both in the matrix's order."""
        codes = [grid.nearest(weights[:, self.order[where]]) for where, _, grid in self.runs(self.order)]
        return torch.cat(codes, dim=1)[:, self.order.argsort()]

    def straight_through(self, codes: Tensor) -> Tensor:
        """Returns the values that the file will hold, with derivatives by the numbers as if nothing were rounded.

        This is a straight-through estimator. Codes uint8 and values [R, C] are in the matrix's order.
        """
        with torch.no_grad():
            exact = self.stored().values(codes)
        stored = codes[:, self.order]
        pairs = zip(self.slices(), self.sections, strict=True)
        smooth = torch.cat([section.smooth().values(stored[:, where]) for where, section in pairs], dim=1)
        smooth = smooth[:, self.order.argsort()]
        return exact + (smooth - smooth.detach())

    def stored(self) -> TensorSections:
        """Returns a copy whose numbers are rounded as the file will hold them."""
        return replace(self, sections=tuple(section.stored() for section in self.sections))

    def numbers(self) -> Tensor:
        """Returns the float16 numbers of all sections as one vector: EXL2's maxima, or GPTQ's scales."""
        return torch.cat([section.numbers.flatten() for section in self.sections])

    def with_numbers(self, new: Tensor) -> TensorSections:
        """Returns the sections with a vector of other numbers, rounded or not, in the place of `numbers()`."""
        vectors = new.split([section.numbers.numel() for section in self.sections])
        pairs = zip(self.sections, vectors, strict=True)
        return replace(self, sections=tuple(section.with_numbers(vector) for section, vector in pairs))

    def clone(self) -> TensorSections:
        """Returns a copy whose stored numbers may be changed."""
        return replace(self, sections=tuple(section.clone() for section in self.sections))

    def numpy(self) -> Sections:
        return Sections(self.order.cpu().numpy(), tuple(section.numpy() for section in self.sections))
