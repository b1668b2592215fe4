"""Measures what the model loses if its embedding or its output alone is stored in each of several types."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lqexport.calibration.collect import final_states
from lqexport.calibration.moments import SecondMoments
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.pipeline.measured_losses import MeasuredLosses
from lqexport.recipe import SolverSettings
from lqexport.runtime.progress import Listener
from lqexport.solver.linear import solve_linear
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import StoredTensor, decoded

SEQUENCES = 4
"""Calibration sequences on which the embedding and the output are measured."""


class Replaced:
    """A model with one tensor replaced."""

    def __init__(self, weights: Weights, tensor: StoredTensor) -> None:
        self._weights, self._tensor = weights, tensor
        self.config = weights.config

    def names(self) -> list[str]:
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(decoded(self._tensor)) if name == self._tensor.name else self._weights.read(name)


def measure_outer(
    source: Weights, choices: dict[str, tuple[str, ...]], tokens: Tensor, device: torch.device,
    measured: MeasuredLosses, listener: Listener, settings: SolverSettings | None = None,
) -> None:  # fmt: skip
    """Measures the mean KL divergence if the embedding or the output alone is stored in each of its codecs.

    choices    tensor name to codec names
    tokens     int64 [samples, length], of which the first few are used
    settings   of the solver, if it works on the output; None if both tensors are rounded
    """
    if not choices:
        return
    original, tokens = BlockModel(source, device), tokens[:SEQUENCES]
    states = final_states(original, tokens)
    head = (
        original.architecture.output
        if original.architecture.output in source.names()
        else original.architecture.embedding
    )
    hessian = output_moments(original, states) if settings and head in choices else None
    for name, codec_names in choices.items():
        losses = {}
        for codec_name in codec_names:
            weight = source.read(name)
            if hessian is not None and settings is not None and name == head:
                stored = solve_linear(name, weight, hessian, codec_name, replace(settings, descent=0))
            else:
                stored = round_tensor(name, weight, codec_name)
            changed = BlockModel(Replaced(source, stored), device)
            # The states do not depend on an output that has weights of its own.
            changed_states = states if name == original.architecture.output else final_states(changed, tokens)
            pairs = zip(states, changed_states, strict=True)
            divergences = [divergence(original.logits(p.to(device)), changed.logits(q.to(device))) for p, q in pairs]
            losses[codec_name] = max(0.0, sum(divergences) / len(divergences))
        measured.add(name, losses)
        listener.advance(1)


def output_moments(model: BlockModel, states: list[Tensor]) -> Tensor:
    """Returns the normalized second moments of the output layer's inputs, from the states after the last block."""
    moments = SecondMoments(states[0].shape[-1], "normalized", model.device)
    for state in states:
        moments.add(model.normed(state[None].to(model.device)))
    return moments.hessian()


def divergence(theirs: Tensor, ours: Tensor) -> float:
    """Returns the mean KL(theirs || ours) of logits [n, vocabulary], in nats."""
    p, q = log_softmax(theirs.double(), -1), log_softmax(ours.double(), -1)
    return float(kl_div(q, p, reduction="batchmean", log_target=True))
