"""Asymmetric calibration: computes the weights whose outputs, on the quantized model's inputs, are the right ones.

X are the inputs of a linear in the full-precision model, and Y those in the quantized model. The error |W X - Q Y|^2
is, up to a constant, (Q - V) (Y Y^T) (Q - V)^T for V = W (X Y^T) (Y Y^T)^-1. This is the solver's loss around the
target V instead of W. Taken whole, the correction V - W would fit the calibration text too closely (CoreQ). So it is
computed from half of the batches, and its strength is the one that leaves the least error on the other half.

The output of some linears is added to hidden states. Such a linear also corrects the error of these hidden states: with
Z those of the full-precision model and S those of the quantized model, |W X + Z - Q Y - S|^2 only adds (Z - S) Y^T to W
(X Y^T).

docs/solver.md has a worked example ("The asymmetric target"); its D is Z - S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.calibration.moments import add_products, mirror
from lqexport.recipe import Moments
from lqexport.runtime.placement import Placement
from lqexport.runtime.processes import ALONE, Processes
from lqexport.runtime.products import add_times_transposed, times_transposed
from lqexport.solver.cholesky import CholeskyFactor

STRENGTH_ROWS = 128
"""The rows of a linear, about, that decide the strength of its correction."""


@dataclass(frozen=True)
class Entering:
    """The inputs of a linear in one of the two models.

    inputs   [..., C]
    stream   the hidden states [..., R] that the linear's output is added to; None if it is not added to any
    """

    inputs: Tensor
    stream: Tensor | None = None


class CrossMoments:
    """The sums over tokens that asymmetric calibration needs, one for each half of the batches.

    They are Y Y^T, on and below the diagonal alone, and (X - Y) Y^T, float32 [2, C, C]. If the linear's output is added
    to hidden states, (Z - S) Y^T is summed as well, float32 [2, R, C].

    columns        C
    moments_type   how tokens are weighted, as in `moments.SecondMoments`: by the inputs Y that the solver sees
    placement      where totals and the panels of Cholesky factors are kept
    rows           R if the output is added to hidden states, else 0

    With normalized moments, the tokens of a linear whose output is added to hidden states are weighted by 1 / |S|^2
    instead, since the next norm divides by the size of the hidden states. Some of these are a thousand times as large
    as others. With plain moments those few would rule (Z - S) Y^T, so it is left out.

    Tokens come in shards, as in `moments.SecondMoments`.
    """

    def __init__(self, columns: int, moments_type: Moments, placement: Placement, rows: int = 0) -> None:
        self.moments_type, self._placement = moments_type, placement
        self._shapes = {"inputs": (2, columns, columns), "drift": (2, columns, columns), "tokens": (1,)}
        if rows and moments_type != "plain":
            self._shapes["lag"] = (2, rows, columns)
        self._shard: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}  # the previous shard's memory: allocating large matrices anew takes long
        self._total: dict[str, Tensor] = {}

    def _zeros(self) -> dict[str, Tensor]:
        spare, self._spare, device = self._spare, {}, self._placement.device
        return {
            name: spare[name].zero_() if name in spare else torch.zeros(shape, device=device)
            for name, shape in self._shapes.items()
        }

    def add(self, half: int, full: Entering, quantized: Entering, weights: Tensor | None = None) -> None:
        """Adds what enters in both models for the same tokens to a half of the batches, 0 or 1.

        Guided moments need the tokens' weights, float32 [tokens].
        """
        shard = self._shard = self._shard or self._zeros()
        roots = self._token_roots(quantized, weights)
        x, y = (_tokens(model.inputs) * roots for model in (full, quantized))
        add_products(shard["inputs"][half], y)
        add_times_transposed(shard["drift"][half], (x - y).T, y.T)
        shard["tokens"] += len(x)
        if "lag" in shard:
            assert full.stream is not None
            assert quantized.stream is not None
            lag = (_tokens(full.stream) - _tokens(quantized.stream)) * roots
            add_times_transposed(shard["lag"][half], lag.T, y.T)

    def end_shard(self, processes: Processes = ALONE, senders: int = 1) -> None:
        """Ends a shard: adds what was added since the last call to the total, which the first process keeps.

        It adds the shards of the first `senders` processes in the order of their ranks.
        """
        keep = self._placement.moments.keep
        shard = self._shard or self._zeros()
        for name, tensor in shard.items():
            for shard_sum in processes.received(tensor, 0, senders):
                total = self._total.get(name)
                self._total[name] = keep(shard_sum) if total is None else total.add_(shard_sum.to(total.device))
        self._shard = {}
        self._spare = {name: tensor for name, tensor in shard.items() if tensor is not self._total.get(name)}

    def share(self, processes: Processes) -> None:
        """Gives all processes the first one's total, after the last shard."""
        self._spare = {}
        if processes.count == 1:
            return
        for name, tensor in (self._total or self._zeros()).items():
            self._total[name] = self._placement.moments.keep(processes.broadcast(tensor.to(self._placement.device)))

    def _token_roots(self, quantized: Entering, weights: Tensor | None) -> Tensor:
        """Returns the square root of each token's weight, float32 [tokens, 1]."""
        if weights is not None:
            return weights.to(quantized.inputs.device).sqrt()[:, None]
        if self.moments_type == "plain":
            return torch.ones(quantized.inputs.shape[:-1].numel(), 1, device=quantized.inputs.device)
        divided = _tokens(quantized.inputs if quantized.stream is None else quantized.stream)
        return divided.norm(dim=1, keepdim=True).clamp_min(1e-15).reciprocal()

    def _sum(self, name: str, half: int) -> Tensor:
        """Returns a sum of one half on the device: one at a time, since the device may not hold all of them."""
        total = self._totals()[name][half].to(self._placement.device)
        return mirror(total) if name == "inputs" else total

    def _both(self, name: str) -> Tensor:
        """Returns a sum of both halves on the device, as a new tensor."""
        first, second = (total.to(self._placement.device) for total in self._totals()[name])
        both = first + second
        return mirror(both) if name == "inputs" else both

    def _totals(self) -> dict[str, Tensor]:
        """Returns the totals, with all shards."""
        if self._shard or not self._total:
            self.end_shard()
        return self._total

    def _count(self) -> Tensor:
        """Returns the number of tokens, float32 [1], or 1 if there are none."""
        return self._totals()["tokens"].to(self._placement.device).clamp_min(1)

    def hessian(self) -> Tensor:
        """Returns the Hessian of the quantized model's inputs, float32 [C, C], as `SecondMoments.hessian` does."""
        return self._both("inputs").div_(self._count())

    def target(self, weight: Tensor, cholesky: CholeskyFactor) -> tuple[Tensor, float]:
        """Returns the target [R, C] to quantize instead of float32 `weight`, and the correction's strength, 0 to 1.

        `cholesky` is the factor of `hessian`, damped and in any order.
        """
        strength = self._strength(weight, cholesky)
        if not strength:
            return weight, strength
        pull = times_transposed(weight, self._both("drift").mT)
        if "lag" in self._shapes:
            pull += self._both("lag")
        return weight + strength * self._correction(pull, cholesky), strength

    def _strength(self, weight: Tensor, cholesky: CholeskyFactor) -> float:
        """Returns the strength at which corrections from one half of the batches leave the least error on the other.

        About STRENGTH_ROWS rows of `weight` [R, C] decide. Either half's inputs weigh as both halves' together do, so
        that one factor serves both.
        """
        rows = slice(None, None, max(1, len(weight) // STRENGTH_ROWS))
        sample = weight[rows].contiguous()
        pulls = [self._half_pull(sample, rows, half) for half in (0, 1)]
        traces = [float(inputs.diagonal().sum()) for inputs in self._totals()["inputs"]]
        wanted = energy = 0.0
        for half, other in ((0, 1), (1, 0)):
            share = traces[half] / max(sum(traces), 1e-30)
            if not share:
                continue
            correction = self._correction(pulls[half] / share, cholesky)
            wanted += float((pulls[other] * correction).sum())
            energy += float((times_transposed(correction, self._sum("inputs", other)) * correction).sum())
        return min(max(wanted / energy, 0.0), 1.0) if energy > 0 else 0.0

    def _half_pull(self, sample: Tensor, rows: slice, half: int) -> Tensor:
        """Returns what half of the batches says of `sample`, the rows `rows` of W, with the shape of `sample`.

        It is the missing outputs times the inputs: W (X - Y) Y^T, plus (Z - S) Y^T if it is summed.
        """
        pull = times_transposed(sample, self._sum("drift", half).mT)
        return pull.add_(self._sum("lag", half)[rows]) if "lag" in self._shapes else pull

    def _correction(self, pull: Tensor, cholesky: CholeskyFactor) -> Tensor:
        """Returns pull (Y Y^T)^-1, float32 [R, C]."""
        return cholesky.solved(pull / self._count())


def _tokens(states: Tensor) -> Tensor:
    """Returns states [..., C] of any float dtype as float32 [tokens, C]."""
    return states.reshape(-1, states.shape[-1]).float()
