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
from lqexport.solver.cholesky import factorize, runs


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
        self._total: dict[str, Tensor] = {}

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, device=self._placement.device) for name, shape in self._shapes.items()}

    def add(self, half: int, full: Entering, quantized: Entering, weights: Tensor | None = None) -> None:
        """Adds what enters in both models for the same tokens to a half of the batches, 0 or 1.

        Guided moments need the tokens' weights, float32 [tokens].
        """
        shard = self._shard = self._shard or self._zeros()
        roots = self._token_roots(quantized, weights)
        x, y = (_tokens(model.inputs) * roots for model in (full, quantized))
        add_products(shard["inputs"][half], y)
        shard["drift"][half].addmm_((x - y).T, y)
        shard["tokens"] += len(x)
        if "lag" in shard:
            assert full.stream is not None
            assert quantized.stream is not None
            lag = (_tokens(full.stream) - _tokens(quantized.stream)) * roots
            shard["lag"][half].addmm_(lag.T, y)

    def end_shard(self, processes: Processes = ALONE, senders: int = 1) -> None:
        """Ends a shard: adds what was added since the last call to the total, which the first process keeps.

        It adds the shards of the first `senders` processes in the order of their ranks.
        """
        keep = self._placement.moments.keep
        for name, tensor in (self._shard or self._zeros()).items():
            for shard_sum in processes.received(tensor, 0, senders):
                total = self._total.get(name)
                self._total[name] = keep(shard_sum) if total is None else total.add_(shard_sum.to(total.device))
        self._shard = {}

    def share(self, processes: Processes) -> None:
        """Gives all processes the first one's total."""
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
        if self._shard or not self._total:
            self.end_shard()
        total = self._total[name][half].to(self._placement.device)
        return mirror(total) if name == "inputs" else total

    def hessian(self) -> Tensor:
        """Returns the Hessian of the quantized model's inputs, float32 [C, C], as `SecondMoments.hessian` does."""
        return self._both_halves().div_(self._total["tokens"].to(self._placement.device).clamp_min(1))

    def target(self, weight: Tensor, dampening: float | None) -> tuple[Tensor, float]:
        """Returns the target [R, C] to quantize instead of float32 `weight`, and the correction's strength, 0 to 1.

        `dampening` is that of `cholesky.factorize`. Raises UserError if Y Y^T cannot be factorized.
        """
        pulls = [self._pull(weight, half) for half in (0, 1)]
        correction = self._correction(pulls[0], self._sum("inputs", 0), dampening)
        wanted = float((pulls[1] * correction).sum())
        energy = float(((correction @ self._sum("inputs", 1)) * correction).sum())
        strength = min(max(wanted / energy, 0.0), 1.0) if energy > 0 else 0.0
        if strength:
            correction = self._correction(pulls[0] + pulls[1], self._both_halves(), dampening)
        return weight + strength * correction, strength

    def _both_halves(self) -> Tensor:
        """Returns Y Y^T of both halves, as a new tensor."""
        return self._sum("inputs", 0) + self._sum("inputs", 1)

    def _pull(self, weight: Tensor, half: int) -> Tensor:
        """Returns the missing outputs times the inputs, [R, C]: W (X - Y) Y^T, plus (Z - S) Y^T if it is summed."""
        pull = weight @ self._sum("drift", half)
        return pull.add_(self._sum("lag", half)) if "lag" in self._shapes else pull

    def _correction(self, pull: Tensor, moments: Tensor, dampening: float | None) -> Tensor:
        """Returns pull (Y Y^T)^-1, float32 [R, C], for `moments` = Y Y^T.

        The inverse of the damped matrix is U^T U. The products are float64, one panel of U's columns at a time.
        """
        cholesky = factorize(moments, dampening, act_order=False, keep=self._placement.cholesky.keep)
        panels, pull = list(zip(runs(len(moments)), cholesky.panels, strict=True)), pull.double()
        product = torch.zeros_like(pull)  # pull U^T
        for columns, panel in panels:
            product[:, : columns.stop] += pull[:, columns] @ panel.to(product.device).mT
        parts = [(product[:, : columns.stop] @ panel.to(product.device)).float() for columns, panel in panels]
        return torch.cat(parts, dim=1)


def _tokens(states: Tensor) -> Tensor:
    """Returns states [..., C] of any float dtype as float32 [tokens, C]."""
    return states.reshape(-1, states.shape[-1]).float()
