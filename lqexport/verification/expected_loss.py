"""Measures what a file's types should cost, so that a file that loses more than that is found without a given limit.

The reference is the source's own weights, rounded to nearest in the types that the file stores them in, run by this
program's own forward on the first windows of the text. For float types and Q8_0 a right file loses as much. Solved
files of 2 to 6 bits lose less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lqexport.evaluation import evaluate
from lqexport.evaluation.activations import rounding
from lqexport.evaluation.evaluate import Evaluation
from lqexport.evaluation.logits import BlockLogits
from lqexport.evaluation.protocols import Protocol
from lqexport.formats.registry import codec_named
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.runtime.progress import Listener
from lqexport.verification.result import ExpectedLoss, TensorCheck, Verification
from lqexport.verification.rounded_source import RoundedSource
from lqexport.verification.walk import Walk

TOKENS = 1024
"""Scored tokens that the expected loss is measured on, in at most WINDOWS windows."""
WINDOWS = 4
FLOOR = 1e-5
"""Mean KL divergence, in nats, that is put down to an engine's arithmetic: an F16 file has 2e-6 in llama.cpp."""


def expected_loss(
    result: Verification,
    evaluation: Evaluation,
    file: Weights,
    rounded: RoundedSource,
    reference: BlockLogits,
    windows: NDArray[np.int64],
    protocol: Protocol,
    listener: Listener,
) -> ExpectedLoss | None:
    """Returns a file's mean KL divergence on the first windows beside that of the source rounded to the file's types.

    evaluation   the file's, on all windows
    file         the file's weights, with its adapter if it has one
    reference    the source's logits on all windows

    Returns None where the file loses no more than FLOOR, so that nothing need be run, and where the
    rounded source cannot be computed, which adds a warning.
    """
    count = min(len(windows), WINDOWS, math.ceil(TOKENS / protocol.scored))
    measured = float(np.mean(evaluation.kl_by_window[:count]))
    if measured <= FLOOR or not math.isfinite(measured):
        return None
    models = (reference.model, BlockModel(file, result.device), rounded_model(result, rounded))
    try:
        walk = Walk(*models, windows[:count], protocol, listener)
    except ValueError as error:
        result.warnings.append(f"What the file's types should cost is not known: {error}.")
        return None
    first = BlockLogits(reference.model, reference.hidden[:count])
    expected = evaluate.compare(first, walk.rounded, windows[:count], protocol, listener).kl
    return ExpectedLoss(protocol.name, count, measured, expected, FLOOR, walk.parts, walk.kl)


def rounded_model(result: Verification, rounded: RoundedSource) -> BlockModel:
    """Returns the model of the rounded source, which rounds the inputs of linears as the file's engine does."""
    return BlockModel(rounded, result.device, rounding=_input_rounding(result))


def _input_rounding(result: Verification) -> Callable[[Tensor], Tensor] | None:
    """Returns the rounding of the inputs of linears that the engine does; None if it does none."""
    if result.activations:
        return rounding(result.activations)
    return engine_rounding(result.tensors) if result.engine == "llama.cpp" else None


def engine_rounding(tensors: Sequence[TensorCheck]) -> Callable[[Tensor], Tensor] | None:
    """Returns how llama.cpp's CPU code rounds the inputs of a file's linears: all as the coarsest of their types.

    It rounds them to 8 bits: 256 numbers together beside types of superblocks, else 32 together. Beside float types it
    rounds them to that type.
    """
    types = {tensor.codec for tensor in tensors if len(tensor.shape) == 2}
    if any(codec_named(name).block == 256 for name in types):
        return _eight_bits(256)
    if types - {"gguf:F32", "gguf:F16", "gguf:BF16"}:
        return _eight_bits(32)
    if "gguf:BF16" in types:
        return lambda inputs: inputs.bfloat16().to(inputs.dtype)
    return (lambda inputs: inputs.half().to(inputs.dtype)) if "gguf:F16" in types else None


def _eight_bits(group: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that rounds `group` inputs together to integers of 8 bits times a scale."""

    def rounded(inputs: Tensor) -> Tensor:
        size = math.gcd(group, inputs.shape[-1])
        groups = inputs.unflatten(-1, (-1, size))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        return ((groups / scale.clamp_min(1e-30)).round() * scale).flatten(-2)

    return rounded
