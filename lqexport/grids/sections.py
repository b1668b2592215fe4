"""`formats.codec.Sections` as torch tensors: a matrix whose columns are stored in an order of their own, in runs that
have a grid each. EXL2's runs have scales under shared maxima, GPTQ's one run has scales with integer zero points."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lqexport.formats import gptq
from lqexport.formats.codec import Grid, ScaleFormat, Scales, Sections
from lqexport.formats.exl2 import SquaredScales
from lqexport.grids.grid import Numbers, TensorGrid, half


def squared_scale(maxima: Tensor, subs: Tensor) -> Tensor:
    """The scale that ExLlamaV2 computes from M and s, which broadcast: float32, rounded to float16 where it rounds."""
    return half((subs.float() + 1).square() * half(maxima / 256))


def storable(maxima: Tensor, bits: int) -> Tensor:
    """EXL2's maxima rounded to float16, none so large that a weight would become infinite."""
    return half(maxima.clamp(0, 65504 / 2 ** (bits - 1)))


def storable_scales(scales: Tensor) -> Tensor:
    """GPTQ's scales rounded to float16, none so large that a weight would become infinite."""
    return half(scales.clamp(-gptq.MOST_SCALE, gptq.MOST_SCALE))


@dataclass(frozen=True)
class SquaredSection:
    """A run of EXL2's groups with their stored numbers (`formats.exl2.SquaredScales`).

    levels   float32 [1, K];  group   columns of a group
    maxima   float32 [G], each exactly a float16, shared by all rows;  subs   int16 [R, G]
    """

    levels: Tensor
    group: int
    maxima: Tensor
    subs: Tensor

    @property
    def columns(self) -> int:
        return self.group * len(self.maxima)

    def grid(self) -> TensorGrid:
        """The values that the numbers allow, as a grid whose scales are those that ExLlamaV2 computes."""
        scales = squared_scale(self.maxima, self.subs)
        numbers = Numbers(ScaleFormat(self.group), scales, torch.ones_like(self.subs))
        return TensorGrid(self.columns, self.levels, True, numbers, half=True)

    def smooth(self) -> TensorGrid:
        """The same with nothing rounded, which has derivatives by the maxima."""
        scales = (self.subs.float() + 1).square() * (self.maxima / 256)
        numbers = Numbers(ScaleFormat(self.group), scales, torch.ones_like(self.subs))
        return TensorGrid(self.columns, self.levels, True, numbers)

    def stored(self) -> SquaredSection:
        """With its numbers as the file will hold them."""
        return replace(self, maxima=storable(self.maxima, self.levels.shape[1].bit_length() - 1))

    @property
    def numbers(self) -> Tensor:
        """What the file stores as float16: the maxima."""
        return self.maxima

    def with_numbers(self, new: Tensor) -> SquaredSection:
        return replace(self, maxima=new)

    def part(self, groups: slice) -> SquaredSection:
        """Some of the groups."""
        return replace(self, maxima=self.maxima[groups], subs=self.subs[:, groups].contiguous())

    def clone(self) -> SquaredSection:
        return replace(self, maxima=self.maxima.clone(), subs=self.subs.clone())

    def numpy(self) -> Grid:
        scale = SquaredScales(self.maxima.cpu().numpy().astype(np.float16), self.subs.cpu().numpy())
        return Grid(self.columns, self.levels[0].cpu().numpy(), scale, half=True)


@dataclass(frozen=True)
class ZeroSection:
    """The groups of a matrix of GPTQ's with their stored numbers.

    zero     how the file stores zero points, and with them the range that they have
    scales   float32 [R, G], each exactly a float16;  zeros   int16 [R, G]
    """

    columns: int
    zero: ScaleFormat
    scales: Tensor
    zeros: Tensor

    @property
    def group(self) -> int:
        return self.columns // self.scales.shape[1]

    def smooth(self) -> TensorGrid:
        """The same with nothing rounded, which has derivatives by the scales."""
        return replace(self.grid(), half=False)

    def stored(self) -> ZeroSection:
        """With its numbers as the file will hold them."""
        return replace(self, scales=storable_scales(self.scales))

    @property
    def numbers(self) -> Tensor:
        """What the file stores as float16: the scales."""
        return self.scales

    def with_numbers(self, new: Tensor) -> ZeroSection:
        return replace(self, scales=new.view_as(self.scales))

    def part(self, groups: slice) -> ZeroSection:
        """Some of the groups."""
        scales, zeros = self.scales[:, groups].contiguous(), self.zeros[:, groups].contiguous()
        return replace(self, columns=scales.shape[1] * self.group, scales=scales, zeros=zeros)

    def grid(self) -> TensorGrid:
        """The values that the numbers allow."""
        levels = torch.from_numpy(gptq.LEVELS).to(self.scales.device)[None]
        scale = Numbers(replace(self.zero, low=1, high=1, sign=1), self.scales, torch.ones_like(self.zeros))
        return TensorGrid(self.columns, levels, True, scale, Numbers(self.zero, self.scales, self.zeros), half=True)

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
    """`formats.codec.Sections` as tensors: order int64 [C], sections of consecutive stored columns."""

    order: Tensor
    sections: tuple[Section, ...]

    @staticmethod
    def of(grid: Sections, device: torch.device) -> TensorSections:
        """A format's own object on a device."""
        sections = tuple(_section_of(part, device) for part in grid.grids)
        return TensorSections(torch.from_numpy(grid.order).to(device), sections)

    def slices(self) -> list[slice]:
        """The stored columns of each section."""
        ends = list(itertools.accumulate(section.columns for section in self.sections))
        return [slice(end - section.columns, end) for end, section in zip(ends, self.sections, strict=True)]

    def runs(self, order: Tensor) -> list[tuple[slice, Tensor, TensorGrid]]:
        """As for `TensorGrid`. Columns of several sections are solved in the order in which they are stored."""
        if len(self.sections) == 1:
            return self.sections[0].grid().runs(self.order.argsort()[order])
        assert order is self.order
        pairs = zip(self.slices(), self.sections, strict=True)
        return [(where, torch.arange(part.columns, device=order.device), part.grid()) for where, part in pairs]

    def stored_values(self, codes: Tensor) -> Tensor:
        """Decoded weights float32 [R, C] for codes uint8 [R, C], both in stored order."""
        return torch.cat([grid.values(codes[:, where]) for where, _, grid in self.runs(self.order)], dim=1)

    def values(self, codes: Tensor) -> Tensor:
        """Decoded weights float32 [R, C] for codes uint8 [R, C], both in the matrix's order."""
        return self.stored_values(codes[:, self.order])[:, self.order.argsort()]

    def nearest(self, weights: Tensor) -> Tensor:
        """Codes uint8 [R, C] of the values nearest to float32 [R, C]."""
        codes = [grid.nearest(weights[:, self.order[where]]) for where, _, grid in self.runs(self.order)]
        return torch.cat(codes, dim=1)[:, self.order.argsort()]

    def straight_through(self, codes: Tensor) -> Tensor:
        """`values` with the numbers rounded as the file will hold them, but with the derivatives by the numbers that
        they would have if nothing were rounded (a straight-through estimator)."""
        with torch.no_grad():
            exact = self.stored().values(codes)
        stored = codes[:, self.order]
        pairs = zip(self.slices(), self.sections, strict=True)
        smooth = torch.cat([section.smooth().values(stored[:, where]) for where, section in pairs], dim=1)
        smooth = smooth[:, self.order.argsort()]
        return exact + (smooth - smooth.detach())

    def stored(self) -> TensorSections:
        """With its numbers as the file will hold them."""
        return replace(self, sections=tuple(section.stored() for section in self.sections))

    def numbers(self) -> Tensor:
        """The float16 numbers of all sections in a row: EXL2's maxima, or GPTQ's scales."""
        return torch.cat([section.numbers.flatten() for section in self.sections])

    def with_numbers(self, new: Tensor) -> TensorSections:
        """The same with other numbers in the place of `numbers`, whether rounded or not."""
        parts = new.split([section.numbers.numel() for section in self.sections])
        pairs = zip(self.sections, parts, strict=True)
        return replace(self, sections=tuple(section.with_numbers(part) for section, part in pairs))

    def clone(self) -> TensorSections:
        """With numbers of its own, which may be changed."""
        return replace(self, sections=tuple(section.clone() for section in self.sections))

    def numpy(self) -> Sections:
        return Sections(self.order.cpu().numpy(), tuple(section.numpy() for section in self.sections))
