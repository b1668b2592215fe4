"""Rounds a matrix to the nearest values of a codec, without any solver.

`verify` compares a file with it (`lqexport.verification.expected_loss`), and may share no code with the solver.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import Codec, Grid, GridCodec, PlainCodec, Planes, SectionedCodec, Sections, TrellisCodec
from lqexport.formats.registry import codec_named
from lqexport.formats.trellis import DISTORTION
from lqexport.grids.fit import fit, minmax
from lqexport.grids.fit_sections import fit_sections, minmax_sections
from lqexport.grids.grid import TensorGrid
from lqexport.grids.sections import TensorSections
from lqexport.grids.whole import fitted_whole, in_units

CHUNK = 1 << 24
"""Number of weights that are rounded at once. It bounds the memory that a large embedding needs."""
SAME = 0.9
"""Least share of stored numbers that two grids of the same rule have in common. Devices may round the others apart."""

USUAL_ERRORS = {
    "gguf:IQ1_S": 0.32,
    "gguf:IQ1_M": 0.35,
    "gguf:IQ2_XXS": 0.16,
    "gguf:IQ2_XS": 0.13,
    "gguf:IQ2_S": 0.09,
    "gguf:IQ3_XXS": 0.055,
    "gguf:IQ3_S": 0.035,
}
"""Relative squared error that llama.cpp's quantizer leaves in matrices of each type that nothing here rounds to.

The i-quants among them are written, but to search the codebook for every weight of a model would take too long.

It is the largest of Gaussian weights and of SmolLM2-135M's, with an importance matrix and without, rounded up."""


def rounded_like(codec_name: str, planes: Planes, weight: Tensor) -> Tensor:
    """Returns a matrix rounded to nearest in the type of a stored one, float32 [R, C].

    planes   the stored matrix [R, C] in the codec `codec_name`
    weight   the matrix [R, C] to round, of any float dtype

    Where the stored grid is the min-max grid of `weight`, as plain rounding and GPTQ leave it, that grid is taken.
    Otherwise the grid is fitted to `weight` with the same importance for all columns. A codec that reorders columns
    takes the order of the stored matrix. For a type of `USUAL_ERRORS` and for EXL3, the stored weights stand for the
    rounded ones (`_stand_in`). Raises ValueError if the codec cannot hold the weights.
    """
    codec = codec_named(codec_name)
    if isinstance(codec, SectionedCodec):
        return _rounded_sections(codec, planes, weight.float())
    if isinstance(codec, PlainCodec):
        return torch.cat([_rounded_plain(codec, rows.float()) for rows in _chunks(weight)])
    if isinstance(codec, TrellisCodec):
        return _stand_in(codec, planes, weight.float(), DISTORTION[codec.trellis.halves / 2])
    if codec.name in USUAL_ERRORS:
        return _stand_in(codec, planes, weight.float(), USUAL_ERRORS[codec.name])
    assert isinstance(codec, GridCodec)
    stored = codec.unpack(planes, weight.shape[1])[0]
    whole = fitted_whole(codec, weight)
    use_minmax = _is_minmax(codec, stored, weight, whole)
    return torch.cat([_rounded_grid(codec, rows.float(), use_minmax, whole) for rows in _chunks(weight)])


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.split(max(1, CHUNK // weight.shape[1]))


def _rounded_plain(codec: PlainCodec, weight: Tensor) -> Tensor:
    planes = codec.encode_values(weight.cpu().numpy())
    return torch.from_numpy(codec.decode(planes, weight.shape[1])).to(weight.device)


def _rounded_grid(codec: GridCodec, weight: Tensor, use_minmax: bool, whole: float) -> Tensor:
    units = in_units(weight, whole)
    grid = minmax(codec, units) if use_minmax else fit(codec, units, torch.ones_like(weight[0]))
    return replace(grid, whole=whole).values(grid.nearest(units))


def _is_minmax(codec: GridCodec, stored: Grid, weight: Tensor, whole: float) -> bool:
    """Returns whether a stored grid is the min-max grid of `weight`, by the rows of the first chunk."""
    rows = in_units(_chunks(weight)[0].float(), whole)
    return _same_share(_numbers(minmax(codec, rows).numpy()), _numbers(stored), len(rows)) >= SAME


def _rounded_sections(codec: SectionedCodec, planes: Planes, weight: Tensor) -> Tensor:
    stored = codec.unpack(planes, weight.shape[1])[0]
    order = torch.from_numpy(np.asarray(stored.order, np.int64)).to(weight.device)
    grid: TensorGrid | TensorSections = minmax_sections(codec, weight, order)
    pairs = zip(_runs(grid.numpy()), _runs(stored), strict=True)
    if min(_same_share(_numbers(ours), _numbers(theirs), len(weight)) for ours, theirs in pairs) < SAME:
        grid = fit_sections(codec, weight, torch.ones_like(weight[0]), order)
    return grid.values(grid.nearest(weight))


def _stand_in(codec: Codec, planes: Planes, weight: Tensor, usual: float) -> Tensor:
    """Returns the stored weights, float32 [R, C], as what rounding to a type leaves that nothing here rounds to.

    Where their relative squared error is above the usual one, they are moved towards `weight` until they have that
    error.
    """
    error = torch.from_numpy(codec.decode(planes, weight.shape[1])).to(weight.device) - weight
    relative = float(error.square().sum() / weight.square().sum().clamp_min(1e-30))
    return weight + error * (min(1.0, (usual / relative) ** 0.5) if relative else 1.0)


def _runs(grid: Grid | Sections) -> tuple[Grid, ...]:
    return grid.grids if isinstance(grid, Sections) else (grid,)


def _numbers(grid: Grid) -> np.ndarray:
    """Returns the scales of a grid, [R, G], or its tables, [R, K]."""
    return grid.levels if grid.scale is None else grid.scale.values()


def _same_share(ours: np.ndarray, theirs: np.ndarray, rows: int) -> float:
    """Returns the share of the first rows' numbers that are the same."""
    return float(np.mean(ours[:rows] == theirs[:rows]))
