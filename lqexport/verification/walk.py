"""Runs a source, its file and the source rounded to the file's types side by side, one decoder block at a time.

Each block of the file runs on the source's hidden states, so that the errors of earlier blocks do not count. So does
the block of the rounded source, whose error is what rounding costs there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.evaluation.logits import BlockLogits
from lqexport.evaluation.protocols import Protocol
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener
from lqexport.verification.result import Part

BINS = 8
"""Number of bins of positions for which the file's KL divergence is kept."""


class Walk:
    """The parts of a model compared on the first window, and the rounded source's hidden states on all windows.

    parts     the embedding, every block and the output, in this order
    rounded   the rounded source's logits of the scored tokens, for each window
    kl        mean KL(source || file) in BINS bins of positions of the first window, in nats
    """

    def __init__(
        self,
        source: BlockModel,
        file: BlockModel,
        rounded: BlockModel,
        windows: NDArray[np.int64],
        protocol: Protocol,
        listener: Listener,
    ) -> None:
        listener.stage(f"Run the rounded source, {protocol.name}", len(source) * len(windows))
        self._models = (source, file, rounded)
        self._starts = [model.start(torch.from_numpy(windows[:1])) for model in self._models]
        self._source, self._file = self._starts[:2]
        self._hidden = [rounded.start(torch.from_numpy(window)[None]) for window in windows]
        for model in self._models:
            model.let_go()
        with torch.no_grad():
            blocks = [self._block(index, listener) for index in range(len(source))]
            self.parts = [self._embedding(), *blocks, self._output()]
            self.kl = self._divergence()
        self.rounded = BlockLogits(rounded, [state[:, protocol.first - 1 : -1] for state in self._hidden])

    def _embedding(self) -> Part:
        names = [name for name in (self._models[0].architecture.embedding,) if name in self._models[0].weights.names()]
        starts = [self._models[0].hidden_of(states) for states in self._starts]
        return _part("the embedding", starts, torch.zeros_like(starts[0]), names)

    def _block(self, index: int, listener: Listener) -> Part:
        _, file, rounded = self._models
        blocks = [model.block(index) for model in self._models]
        before = self._source
        outputs = [model.run(block, before) for model, block in zip(self._models, blocks, strict=True)]
        self._source, self._file = outputs[0], file.run(blocks[1], self._file)
        for window, state in enumerate(self._hidden):
            self._hidden[window] = rounded.run(blocks[2], state)
            listener.advance(1)
        hidden = self._models[0].hidden_of
        return _part(f"block {index}", [*map(hidden, outputs)], hidden(before), self._models[0].names(index))

    def _output(self) -> Part:
        source = self._models[0]
        logits = [model.logits(self._source) for model in self._models]
        centred = [values - values.mean(-1, keepdim=True) for values in logits]
        names = [f"{source.architecture.final_norm}.weight", source.architecture.output]
        known = [name for name in names if name in source.weights.names()]
        return _part("the output", centred, torch.zeros_like(centred[0]), known)

    def _divergence(self) -> list[float]:
        p = self._models[0].logits(self._source)[0].double().log_softmax(-1)
        q = self._models[1].logits(self._file)[0].double().log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1).cpu().numpy()
        return [float(values.mean()) for values in np.array_split(divergence, BINS)]


def _part(name: str, outputs: Sequence[Tensor], before: Tensor, tensors: Sequence[str]) -> Part:
    """Returns a part from the outputs of the source, the file and the rounded source for the same inputs `before`."""
    exact, tested, rounded = outputs
    energy = float((exact - before).norm()) or 1.0
    return Part(name, float((tested - exact).norm()) / energy, float((rounded - exact).norm()) / energy, tuple(tensors))
