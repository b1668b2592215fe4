"""Judges quantized weights with lqexport's own forward pass, in windows of 512 tokens whose second half is scored."""

from __future__ import annotations

import numpy as np
import torch

from lqexport.calibration import texts
from lqexport.evaluation import evaluate
from lqexport.evaluation.logits import BlockLogits, block_logits
from lqexport.evaluation.protocols import LLAMACPP_512, cut, tokenize
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.runtime.progress import Silent


def windows_of(source: Source, text: str, count: int) -> np.ndarray:
    """Returns the first `count` windows, [count, 512], of a text in the source's tokens."""
    tokens = tokenize(source.tokenizer(), texts.read_text(text).content)
    return cut(tokens, LLAMACPP_512, None, count)


def predictions(model: BlockModel, windows: np.ndarray) -> BlockLogits:
    """Returns the logits that predict the scored tokens, [256, vocabulary] for each window."""
    return block_logits(model, windows, LLAMACPP_512, Silent(), "")


class Judge:
    """Computes KL divergence and perplexity of weights against a source, whose logits are computed once."""

    def __init__(self, source: Source, text: str, windows: int, device: torch.device | None = None) -> None:
        self.windows, self.device = windows_of(source, text, windows), device or torch.device("cpu")
        self.reference = list(predictions(BlockModel(source, self.device), self.windows))

    def __call__(self, weights: Weights) -> evaluate.Evaluation:
        test = predictions(BlockModel(weights, self.device), self.windows)
        return evaluate.compare(self.reference, test, self.windows, LLAMACPP_512)
