"""Asymmetric calibration: weights that, on the inputs of the quantized model, aim at the full-precision outputs.

With X the full-precision inputs of a linear and Y those of the quantized prefix, |W X - Q Y|^2 is, up to a constant,
(Q - V) (Y Y^T) (Q - V)^T for V = W (X Y^T) (Y Y^T)^-1: the solver's own loss around another target. Taken whole, the
correction fits the calibration text (CoreQ); so it is computed from half of the batches, and its strength is the one
that leaves the least error on the other half.

Where a linear's output is added to hidden states, it also makes up for what these lack by then. With Z those of the
full-precision model and S the quantized one's, |W X + Z - Q Y - S|^2 only adds (Z - S) Y^T to W (X Y^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lqexport.recipe import Moments
from lqexport.runtime.placement import Placement
from lqexport.runtime.processes import ALONE, Processes
from lqexport.solver.cholesky import factorize, runs


@dataclass(frozen=True)
class Entering:
    """The inputs [..., C] of a linear, and the hidden states [..., R] that its output is added to, where it is."""

    inputs: Tensor
    stream: Tensor | None = None


class CrossMoments:
    """Y Y^T and (X - Y) Y^T of a linear's inputs, float32 [2, C, C], and of `rows` outputs that are added to hidden
    states (Z - S) Y^T, float32 [2, R, C]: one sum of even batches and one of odd.

    Tokens weigh as in `moments.SecondMoments`, by the inputs that the solver sees. Normalized, an output that is added
    to hidden states weighs by the size of those, which the next norm divides them by: some are a thousand times as
    large as others. (Plain would fit those few alone, so it makes up for nothing that is lacking.)

    Tokens come in shards, as in `moments.SecondMoments`. The room says where totals and factors are.
    """

    def __init__(self, columns: int, kind: Moments, placement: Placement, rows: int = 0) -> None:
        self.kind, self._room = kind, placement
        self._shapes = {"own": (2, columns, columns), "drift": (2, columns, columns), "tokens": (1,)}
        if rows and kind != "plain":
            self._shapes["lag"] = (2, rows, columns)
        self._shard: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros(shape, device=self._room.device) for name, shape in self._shapes.items()}

    def add(self, half: int, full: Entering, quantized: Entering, weights: Tensor | None = None) -> None:
        """Add what enters in both models for the same tokens; `half` is 0 or 1. Guided: and weights [tokens]."""
        shard = self._shard = self._shard or self._zeros()
        root = self._root(quantized, weights)
        x, y = (_tokens(model.inputs) * root for model in (full, quantized))
        shard["own"][half].addmm_(y.T, y)
        shard["drift"][half].addmm_((x - y).T, y)
        shard["tokens"] += len(x)
        if "lag" in shard:
            assert full.stream is not None
            assert quantized.stream is not None
            lag = (_tokens(full.stream) - _tokens(quantized.stream)) * root
            shard["lag"][half].addmm_(lag.T, y)

    def end_shard(self, processes: Processes = ALONE, senders: int = 1) -> None:
        """Add what has come since the last call to the first process's total: the shards of the first `senders`
        processes, in their order."""
        keep = self._room.moments.keep
        for name, tensor in (self._shard or self._zeros()).items():
            for part in processes.received(tensor, 0, senders):
                total = self._total.get(name)
                self._total[name] = keep(part) if total is None else total.add_(part.to(total.device))
        self._shard = {}

    def share(self, processes: Processes) -> None:
        """Give all processes the first one's total."""
        if processes.count == 1:
            return
        for name, tensor in (self._total or self._zeros()).items():
            self._total[name] = self._room.moments.keep(processes.broadcast(tensor.to(self._room.device)))

    def _root(self, quantized: Entering, weights: Tensor | None) -> Tensor:
        """Of each token's weight, float32 [tokens, 1]."""
        if weights is not None:
            return weights.to(quantized.inputs.device).sqrt()[:, None]
        if self.kind == "plain":
            return torch.ones(quantized.inputs.shape[:-1].numel(), 1, device=quantized.inputs.device)
        divided = _tokens(quantized.inputs if quantized.stream is None else quantized.stream)
        return divided.norm(dim=1, keepdim=True).clamp_min(1e-15).reciprocal()

    def _sum(self, name: str, half: int) -> Tensor:
        """On the device; one sum at a time, since the others may have no room there."""
        if self._shard or not self._total:
            self.end_shard()
        return self._total[name][half].to(self._room.device)

    def hessian(self) -> Tensor:
        """float32 [C, C], as `moments.SecondMoments.hessian` of the quantized inputs."""
        return self._own().div_(self._total["tokens"].to(self._room.device).clamp_min(1))

    def target(self, weight: Tensor, dampening: float | None) -> tuple[Tensor, float]:
        """The weights [R, C] to quantize in the place of `weight`, and the strength of the correction, 0 to 1."""
        pulls = [self._pull(weight, half) for half in (0, 1)]
        correction = self._correction(pulls[0], self._sum("own", 0), dampening)
        wanted = float((pulls[1] * correction).sum())
        energy = float(((correction @ self._sum("own", 1)) * correction).sum())
        strength = min(max(wanted / energy, 0.0), 1.0) if energy > 0 else 0.0
        if strength:
            correction = self._correction(pulls[0] + pulls[1], self._own(), dampening)
        return weight + strength * correction, strength

    def _own(self) -> Tensor:
        """Of both halves, a new tensor."""
        return self._sum("own", 0) + self._sum("own", 1)

    def _pull(self, weight: Tensor, half: int) -> Tensor:
        """What the outputs lack, times the inputs: [R, C]."""
        pull = weight @ self._sum("drift", half)
        return pull.add_(self._sum("lag", half)) if "lag" in self._shapes else pull

    def _correction(self, pull: Tensor, own: Tensor, dampening: float | None) -> Tensor:
        """The pull [R, C] times (Y Y^T)^-1 = U^T U, dampened, in float64, by panels of U's columns."""
        factor = factorize(own, dampening, act_order=False, keep=self._room.factors.keep)
        panels, pull = list(zip(runs(len(own)), factor.panels, strict=True)), pull.double()
        half = torch.zeros_like(pull)
        for columns, panel in panels:
            half[:, : columns.stop] += pull[:, columns] @ panel.to(half.device).mT
        parts = [(half[:, : columns.stop] @ panel.to(half.device)).float() for columns, panel in panels]
        return torch.cat(parts, dim=1)


def _tokens(states: Tensor) -> Tensor:
    """[..., C] of any float dtype as float32 [tokens, C]."""
    return states.reshape(-1, states.shape[-1]).float()
