"""Quantizes one linear under the mean squares of its inputs alone, as an importance matrix has them.

The Hessian is a diagonal then. An error in one column says nothing about another column, so there is no error to feed
back, and columns depend on each other only through the scales that they share. Runs of columns are therefore solved by
themselves, which takes a time in proportion to the number of weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lqexport.formats.codec import PlainCodec, joined_planes
from lqexport.formats.registry import codec_named
from lqexport.grids.whole import fitted_whole
from lqexport.recipe import SolverSettings
from lqexport.runtime.placement import Placement
from lqexport.solver.linear import SolvedRows, Sums, assembled, solve_rows
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.solver.weight_checks import check_weights
from lqexport.storage.artifact import StoredTensor

RUN = 512
"""Columns of a run, about; whole blocks of the format."""


def solve_weighted(
    name: str, weight: Tensor, means: Tensor, codec_name: str, settings: SolverSettings, placement: Placement
) -> StoredTensor:
    """Returns a linear [R, C] quantized under the mean squares `means` of its inputs, float32 [C].

    codec_name   a codec whose planes have columns on their second axis, as those of GGUF's types
    settings, placement   as for `solve_linear`, whose facts the result has

    Raises UserError as `solve_linear` does.
    """
    check_weights(name, weight, codec_name)
    codec = codec_named(codec_name)
    if isinstance(codec, PlainCodec):
        return round_tensor(name, weight, codec_name)
    undamped = replace(settings, dampening=0.0)  # a diagonal can be inverted as it is
    whole = fitted_whole(codec, weight)
    runs = [
        list(solve_rows(name, weight[:, run], torch.diag(means[run]), codec_name, undamped, placement, whole=whole))
        for run in torch.arange(weight.shape[1]).split(max(1, RUN // codec.block) * codec.block)
    ]
    return assembled(name, codec_name, [_side_by_side(rows) for rows in zip(*runs, strict=True)])


def _side_by_side(runs: tuple[SolvedRows, ...]) -> SolvedRows:
    """Returns the same rows of all runs of columns as one."""
    planes = joined_planes([run.planes for run in runs], axis=1)
    tiles = [_added(sums) for sums in zip(*(run.sums for run in runs), strict=True)]
    return SolvedRows((runs[0].shape[0], sum(run.shape[1] for run in runs)), planes, tiles)


def _added(runs: tuple[Sums, ...]) -> Sums:
    return {key: (max if key == "dampening" else sum)([run[key] for run in runs]) for key in runs[0]}
