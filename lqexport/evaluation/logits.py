"""The logits of a model on windows of tokens, one window at a time, by this program's own forward or by an engine.

A model that is larger than memory can be evaluated: this program loads one decoder block at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.converters.models.architecture import Architecture
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.evaluation.llamacpp_process import LlamaCppProcess
from lqexport.evaluation.mlx_process import MlxProcess
from lqexport.evaluation.protocols import Protocol
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener


def check_predicts(architecture: Architecture) -> None:
    """Raises UserError for an encoder, which predicts no tokens."""
    if architecture.encoder:
        raise UserError(
            f"{architecture.classes[0]} is an encoder, which predicts no tokens: `lqexport verify` compares its "
            "embeddings."
        )


@dataclass(frozen=True)
class BlockLogits:
    """The logits [scored tokens, vocabulary] of a model, one window at a time. They can be iterated over repeatedly.

    hidden   the hidden states [1, scored tokens, hidden] after the last block, for each window
    """

    model: BlockModel
    hidden: list[torch.Tensor]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.model.logits(state)[0] for state in self.hidden)


def block_logits(
    model: BlockModel, windows: NDArray[np.int64], protocol: Protocol, listener: Listener, description: str
) -> BlockLogits:
    """Returns the logits [protocol.scored, vocabulary] that predict the scored tokens, for each window.

    Every decoder block runs over all windows before the next one is loaded, so memory holds one block's weights and
    one hidden state per token. The blocks run during this call; iterating over the result only applies the output
    layer. Raises UserError for an encoder.
    """
    check_predicts(model.architecture)
    listener.stage(description, len(model) * len(windows))
    hidden = [model.start(torch.from_numpy(window)[None]) for window in windows]
    model.let_go()
    for _, block in model.blocks():
        with torch.no_grad():
            for window, state in enumerate(hidden):
                hidden[window] = model.run(block, state)
                listener.advance(1)
    return BlockLogits(model, [state[:, protocol.first - 1 : -1] for state in hidden])


def engine_logits(
    engine: LlamaCpp | LlamaCppProcess | MlxProcess, windows: NDArray[np.int64], protocol: Protocol
) -> Iterator[torch.Tensor]:
    """Yields the logits [protocol.scored, vocabulary] of each window, computed by an engine when they are asked for."""
    for window in windows:
        yield torch.from_numpy(engine.logits(window.tolist(), protocol.first - 1)[:-1])
