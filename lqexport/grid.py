"""A `formats.codec.Grid` as torch tensors, for the solver on any device. `numpy()` gives the format's own object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import Grid, GridCodec, ScaleFormat, Scales


@dataclass(frozen=True)
class Numbers:
    """Stored scales or offsets: supers float32 [R, G / span], each exactly a float16; subs int16 [R, G]."""

    format: ScaleFormat
    supers: Tensor
    subs: Tensor

    def values(self) -> Tensor:
        """float32 [R, G]."""
        return self.format.sign * self.supers.repeat_interleave(self.format.span, 1) * self.subs

    def clone(self) -> Numbers:
        return Numbers(self.format, self.supers.clone(), self.subs.clone())

    def numpy(self) -> Scales:
        return Scales(self.format, self.supers.cpu().numpy().astype(np.float16), self.subs.cpu().numpy())


@dataclass(frozen=True)
class TensorGrid:
    """levels float32 [1 or R, K]; `uniform`: consecutive integers; `group`: columns that share a scale."""

    columns: int
    levels: Tensor
    uniform: bool
    scale: Numbers | None = None
    offset: Numbers | None = None

    @property
    def group(self) -> int:
        return (self.scale.format.group if self.scale else 0) or self.columns

    def per_group(self, rows: int) -> tuple[Tensor, Tensor]:
        """Scales and offsets float32 [R, G]; ones and zeros where the format has none."""
        like = torch.ones(rows, self.columns // self.group, device=self.levels.device)
        scale = self.scale.values() if self.scale else like
        return scale, self.offset.values() if self.offset else torch.zeros_like(like)

    def values(self, codes: Tensor) -> Tensor:
        """Decoded weights float32 [R, C] for codes uint8 [R, C]."""
        levels = self.levels.expand(len(codes), -1).gather(1, codes.long())
        scale, offset = (part.repeat_interleave(self.group, 1) for part in self.per_group(len(codes)))
        return scale * levels + offset

    def nearest(self, weights: Tensor) -> Tensor:
        """Codes uint8 [R, C] of the values nearest to float32 [R, C]."""
        scale, offset = (part.repeat_interleave(self.group, 1) for part in self.per_group(len(weights)))
        return nearest_level((weights - offset) / torch.where(scale == 0, torch.inf, scale), self.levels, self.uniform)

    def numpy(self) -> Grid:
        levels = self.levels.cpu().numpy()
        scale = None if self.scale is None else self.scale.numpy()
        offset = None if self.offset is None else self.offset.numpy()
        return Grid(self.columns, levels if scale is None else levels[0], scale, offset)


def nearest_level(target: Tensor, levels: Tensor, uniform: bool) -> Tensor:
    """Index uint8 of the level nearest to each target [R, N], for levels [1 or R, K]."""
    if uniform:
        return (target.round() - levels[0, 0]).clamp(0, levels.shape[1] - 1).to(torch.uint8)
    middles = ((levels[:, 1:] + levels[:, :-1]) / 2).expand(len(target), -1).contiguous()
    return torch.searchsorted(middles, target.contiguous()).to(torch.uint8)


def shared_levels(codec: GridCodec, device: torch.device) -> tuple[Tensor, bool]:
    """A format's levels [1, K], and whether they are consecutive integers."""
    levels = np.asarray(codec.levels, np.float32)
    return torch.as_tensor(levels, device=device)[None], bool(np.all(np.diff(levels) == 1))
