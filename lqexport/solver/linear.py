"""Quantizes one linear: from its weights and its Hessian to packed planes, by the settings' method.

A Hessian in this package is the second moments of a linear's inputs (`lqexport.calibration.moments`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lqexport.formats.codec import Codec, GridCodec, PlainCodec, Planes, SectionedCodec, TrellisCodec, joined_planes
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import fit, minmax
from lqexport.grids.fit_sections import fit_sections, minmax_sections
from lqexport.grids.grid import TensorGrid
from lqexport.grids.sections import TensorSections
from lqexport.grids.whole import fitted_whole, in_units
from lqexport.recipe import SolverSettings
from lqexport.runtime.placement import Placement, all_on_device
from lqexport.runtime.tiles import in_chunks, tiles
from lqexport.solver.cholesky import CholeskyFactor, factorize
from lqexport.solver.feedback import damped, feedback, layer_loss, refine
from lqexport.solver.importance import importance
from lqexport.solver.input_checks import check_moments, inputs_of
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.solver.solve_exact import in_own_order
from lqexport.solver.solve_sections import refine_sections
from lqexport.solver.trellis_linear import solve_walks
from lqexport.solver.weight_checks import check_weights
from lqexport.storage.artifact import StoredTensor

Sums = dict[str, float]
"""Sums over a tile of rows, by name: of squared weights and errors, and of losses; and the dampening."""


@dataclass(frozen=True)
class SolvedRows:
    """Some rows of a linear, solved and packed.

    shape    R and C of these rows
    planes   their packed bytes
    sums     for each tile of the rows, the sums from which the linear's facts are computed
    """

    shape: tuple[int, int]
    planes: Planes
    sums: list[Sums]


def solve_linear(
    name: str,
    weight: Tensor,
    hessian: Tensor | None,
    codec_name: str,
    settings: SolverSettings,
    placement: Placement | None = None,
    cholesky: CholeskyFactor | None = None,
) -> StoredTensor:
    """Returns a linear quantized by the settings' method.

    weight       [R, C], any float dtype, on any device
    hessian      float32 second moments [C, C], or [G, C, C] with one matrix for each of G equal runs of rows; on any
                 device; None for the method rtn
    codec_name   the codec of the result
    placement    the device that computes, and how many rows it takes at once (None: all rows, on the weight's device)
    cholesky     what `factor_of` returns for these second moments, a single matrix (None: it is computed)

    The facts of the result: `loss` is the squared output error per token, summed over the outputs. `relative_error` is
    the loss over the output's energy. `weight_error` is the squared error of the weights over their squared sum.
    `dampening` is the dampening that the Cholesky factorization took.

    Raises UserError if a weight or the Hessian is NaN or infinite, if a weight is too large for the codec, or if the
    Hessian cannot be factorized.
    """
    check_weights(name, weight, codec_name)
    if isinstance(codec_named(codec_name), PlainCodec):
        return round_tensor(name, weight, codec_name)
    placement = placement or all_on_device(weight.device)
    if not rows_are_apart(codec_name):
        placement = replace(placement, rows=len(weight))
    hessians = [None] if hessian is None else list(hessian.reshape(-1, weight.shape[1], weight.shape[1]))
    assert len(hessians) == 1 or (rows_are_apart(codec_name) and cholesky is None)
    runs = zip(weight.chunk(len(hessians)), hessians, strict=True)
    whole = fitted_whole(codec_named(codec_name), weight)
    parts = [part for run in runs for part in solve_rows(name, *run, codec_name, settings, placement, cholesky, whole)]
    return assembled(name, codec_name, parts)


def rows_are_apart(codec_name: str) -> bool:
    """Returns whether the codec stores each row by itself.

    EXL2, EXL3 and GPTQ's layout do not: their rows are not the first axis of the planes. In EXL2 rows share maxima, and
    EXL3 mixes rows.
    """
    return isinstance(codec_named(codec_name), GridCodec)


def assembled(name: str, codec_name: str, parts: Sequence[SolvedRows]) -> StoredTensor:
    """Returns a linear that is put together from the solved runs of its rows."""
    planes = joined_planes([part.planes for part in parts])
    facts = _summed_facts([tile for part in parts for tile in part.sums])
    return StoredTensor(name, codec_name, (sum(part.shape[0] for part in parts), parts[0].shape[1]), planes, facts)


def unit_of(codec_names: Iterable[str]) -> int:
    """Returns how many columns are solved together in all of the codecs: 1 if only some of them have codebooks."""
    books = [getattr(codec_named(name), "codebook", None) for name in set(codec_names)]
    return max((book.run for book in books if book), default=1) if all(books) else 1


def factor_of(
    name: str, hessian: Tensor, settings: SolverSettings, placement: Placement, unit: int = 1
) -> CholeskyFactor:
    """Returns the Cholesky factor of the second moments [C, C] of the inputs of a linear and those that share them.

    `unit` is as for `factorize`.

    Raises UserError, with the linear's name, if the Hessian is NaN or infinite, or cannot be factorized.
    """
    with inputs_of(name):
        check_moments(hessian)
        return factorize(hessian, settings.dampening, settings.act_order, placement.cholesky.keep, unit)


def solve_rows(
    name: str, weight: Tensor, hessian: Tensor | None, codec_name: str, settings: SolverSettings, placement: Placement,
    cholesky: CholeskyFactor | None = None, whole: float = 1.0,
) -> Iterator[SolvedRows]:  # fmt: skip
    """Yields the solved rows of a linear, `placement.rows` at a time.

    weight    [R, C], a linear or a run of its rows that begins at a tile; only the linear's last tile may be short
    hessian   float32 second moments [C, C] for all of these rows; None for the method rtn
    cholesky  what `factor_of` returns for them (None, or one whose order the codec cannot take: it is computed)
    whole     what `fitted_whole` returns for the linear
    """
    codec = codec_named(codec_name)
    assert not isinstance(codec, PlainCodec)
    hessian = None if hessian is None else hessian.to(placement.device)
    unit = unit_of([codec_name])
    fits = cholesky is not None and cholesky.keeps_together(unit)
    if not fits and hessian is not None and settings.method != "rtn":
        cholesky = factor_of(name, hessian, settings, placement, unit)

    def work(rows: slice) -> SolvedRows:
        chunk = weight[rows].to(placement.device).float()
        if isinstance(codec, TrellisCodec):
            walks = solve_walks(codec.trellis, chunk, hessian, cholesky, settings)
            planes, values = _checked(codec, codec.encode(walks), walks.values(), name)
        else:
            planes, values = _solved_on_grid(codec, chunk, hessian, cholesky, settings, name, whole)
        sums = _sums(torch.from_numpy(values).to(placement.device), chunk, hessian, cholesky)
        return SolvedRows((chunk.shape[0], chunk.shape[1]), planes, sums)

    yield from in_chunks(work, len(weight), placement.rows)


def _sums(values: Tensor, weight: Tensor, hessian: Tensor | None, cholesky: CholeskyFactor | None) -> list[Sums]:
    """Returns for each tile the sums from which facts are computed."""
    tile_sums = []
    for stored, exact in zip(tiles(values), tiles(weight), strict=True):
        difference = stored - exact
        sums = {"weight_error": float(difference.square().sum()), "weight": float(exact.square().sum())}
        if hessian is not None:
            sums |= {"loss": layer_loss(difference, hessian), "energy": layer_loss(exact, hessian)}
        if cholesky is not None:
            sums["dampening"] = cholesky.dampening
        tile_sums.append(sums)
    return tile_sums


def _summed_facts(runs: list[Sums]) -> dict[str, Any]:
    total = {key: sum(run[key] for run in runs) for key in runs[0]}
    facts = {"weight_error": total["weight_error"] / max(total["weight"], 1e-30)}
    if "loss" in total:
        facts |= {"loss": total["loss"], "relative_error": total["loss"] / max(total["energy"], 1e-30)}
    if "dampening" in total:
        facts["dampening"] = max(run["dampening"] for run in runs)
    return facts


def _round_to_nearest(codec: GridCodec | SectionedCodec, weight: Tensor) -> tuple[TensorGrid | TensorSections, Tensor]:
    natural = torch.arange(weight.shape[1], device=weight.device)
    grid = minmax(codec, weight) if isinstance(codec, GridCodec) else minmax_sections(codec, weight, natural)
    return grid, grid.nearest(weight)


def _solved_on_grid(
    codec: GridCodec | SectionedCodec, weight: Tensor, hessian: Tensor | None, cholesky: CholeskyFactor | None,
    settings: SolverSettings, name: str, whole: float,
) -> tuple[Planes, np.ndarray]:  # fmt: skip
    """Returns planes and the values that they decode to."""
    weight = in_units(weight, whole)
    if hessian is None or cholesky is None:
        grid, codes = _round_to_nearest(codec, weight)
    else:
        grid, codes = _solve(codec, weight, hessian, cholesky, settings)
    if isinstance(grid, TensorGrid):
        grid = replace(grid, whole=whole)
    stored, stored_codes = grid.numpy(), codes.cpu().numpy()
    planes = codec.encode(stored, stored_codes)  # type: ignore[arg-type]  # a grid of this codec
    return _checked(codec, planes, stored.values(stored_codes), name)


def _solve(
    codec: GridCodec | SectionedCodec,
    weight: Tensor,
    hessian: Tensor,
    cholesky: CholeskyFactor,
    settings: SolverSettings,
) -> tuple[TensorGrid | TensorSections, Tensor]:
    """Returns the grid and the codes uint8 [R, C]."""
    if isinstance(codec, GridCodec):
        return _solve_grid(codec, weight, hessian, cholesky, settings)
    return _solve_sections(codec, weight, hessian, cholesky, settings)


def _solve_grid(
    codec: GridCodec, weight: Tensor, hessian: Tensor, cholesky: CholeskyFactor, settings: SolverSettings
) -> tuple[TensorGrid, Tensor]:
    if settings.method == "gptq":
        grid = minmax(codec, weight)
    else:
        grid = fit(codec, weight, importance(hessian, cholesky, settings.importance, settings.exponent))
    codes = (in_own_order if settings.solver == "exact" else feedback)(weight, grid, cholesky)
    if settings.method == "lean" and settings.descent:
        return refine(weight, damped(hessian, cholesky.dampening), grid, codes, sweeps=settings.descent, refit=True)
    return grid, codes


def _solve_sections(
    codec: SectionedCodec, weight: Tensor, hessian: Tensor, cholesky: CholeskyFactor, settings: SolverSettings
) -> tuple[TensorSections, Tensor]:
    """Returns grid and codes for a codec that may store columns in the order in which they are solved."""
    order = cholesky.order if codec.reorders else torch.arange(weight.shape[1], device=weight.device)
    if settings.method == "gptq":
        grid = minmax_sections(codec, weight, order)
    else:
        weights = importance(hessian, cholesky, settings.importance, settings.exponent)
        grid = fit_sections(codec, weight, weights, order)
    codes = feedback(weight, grid, cholesky)
    if settings.method == "lean" and settings.descent:
        return refine_sections(weight, damped(hessian, cholesky.dampening), grid, codes, sweeps=settings.descent)
    return grid, codes


def _checked(codec: Codec, planes: Planes, solved: np.ndarray, name: str) -> tuple[Planes, np.ndarray]:
    """Returns planes and the values that they decode to.

    Raises AssertionError if those are not the solved ones, bit for bit.
    """
    values = codec.decode(planes, solved.shape[1])
    if not np.array_equal(values.view(np.uint32), solved.view(np.uint32)):
        raise AssertionError(
            f"{name}: {codec.name} decodes to other values than were solved. This is a bug in lqexport."
        )
    return planes, values
