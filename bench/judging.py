"""Judges quantized weights with lqexport's own forward pass, in windows of 512 tokens whose second half is scored."""

from __future__ import annotations

import numpy as np
import torch

from lqexport.calibration import texts
from lqexport.evaluation import evaluate
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.runtime.progress import Silent


def windows_of(source: Source, text: str, count: int) -> np.ndarray:
    """Returns the first `count` windows, [count, 512], of a text in the source's tokens."""
    tokens = evaluate.tokenize(source.tokenizer(), texts.read_text(text).content)
    return evaluate.cut(tokens, evaluate.LLAMACPP_512, None, count)


def predictions(model: BlockModel, windows: np.ndarray) -> evaluate.BlockLogits:
    """Returns the logits that predict the scored tokens, [256, vocabulary] for each window."""
    return evaluate.block_logits(model, windows, evaluate.LLAMACPP_512, Silent(), "")


class Judge:
    """Computes KL divergence and perplexity of weights against a source, whose logits are computed once."""

    def __init__(self, source: Source, text: str, windows: int, device: torch.device | None = None) -> None:
        self.windows, self.device = windows_of(source, text, windows), device or torch.device("cpu")
        self.reference = list(predictions(BlockModel(source, self.device), self.windows))

    def __call__(self, weights: Weights) -> evaluate.Evaluation:
        test = predictions(BlockModel(weights, self.device), self.windows)
        return evaluate.compare(self.reference, test, self.windows, evaluate.LLAMACPP_512)
