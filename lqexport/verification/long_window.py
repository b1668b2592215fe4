"""Measures a file's loss by position in one long window, up to the length that the model was trained on.

Perplexity and KL divergence come from windows of 512 or 2048 tokens. A wrong rotation, window or scaling for long
contexts costs nothing there. A few positions of each range are scored, so that the logits of a long window need not be
held.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.calibration.sequences import begins_with_bos
from lqexport.calibration.texts import Text
from lqexport.converters.models.rope import head_dim
from lqexport.converters.models.tensor_names import head_count
from lqexport.evaluation import evaluate
from lqexport.evaluation.logits import block_logits
from lqexport.evaluation.protocols import Protocol, tokenize
from lqexport.models.adapters import LowRankFactors
from lqexport.models.blocks import BlockModel
from lqexport.models.context import trained_positions
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.runtime.progress import Listener
from lqexport.verification.expected_loss import rounded_model
from lqexport.verification.long_record import LongWindow, PositionRange
from lqexport.verification.result import Verification
from lqexport.verification.rounded_source import RoundedSource
from lqexport.verification.verify_predictions import engine_failures, in_llamacpp, model_of_file

SCORED = 128
"""The most positions that are scored in a range."""
ROWS = 64
"""The number of positions whose logits are computed at a time."""
LEAST = 64
"""The fewest tokens of a long window."""
EARLY = 32
"""Ranges before this position are shown and not judged: they have few positions, and tokens with little context."""
FLOOR = 1e-4
"""Mean KL divergence, in nats, that is put down to an engine's arithmetic over a long context."""


def measure_long_window(
    result: Verification, export: Weights, factors: LowRankFactors | None, source: Source, text: Text,
    rounded: RoundedSource | None, listener: Listener,
) -> None:  # fmt: skip
    """Measures the loss of a file by position in one long window, and stores it in `result.long`.

    The source, the file and the rounded source run on the first tokens of the text. The file fails if it loses too much
    at late positions. Nothing is done for a model without other evaluations.
    """
    if not result.evaluations:
        return
    window, because = _window(source.tokenizer(), text, source.config)
    if len(window) < LEAST:
        result.warnings.append(f"There is no long window: {because} allows {len(window)} tokens.")
        return
    ranges = _ranges(len(window))
    positions = np.concatenate([scored for *_, scored in ranges])
    with engine_failures(result):
        test = _logits_of_file(result, export, factors, window, positions, listener)
        reference = _logits(BlockModel(source, result.device), window, positions, listener, "source")
        kl, expected = _divergence(reference, test, window, positions), None
        if rounded:
            other = _logits(rounded_model(result, rounded), window, positions, listener, "rounded source")
            expected = _divergence(reference, other, window, positions)
        result.long = LongWindow(len(window), because, _means(ranges, kl, expected))
        check_long_window(result)


def _means(
    ranges: list[tuple[int, int, NDArray[np.int64]]], kl: NDArray[np.float64], expected: NDArray[np.float64] | None
) -> list[PositionRange]:
    ends = np.cumsum([len(scored) for *_, scored in ranges])
    parts = [slice(end - len(scored), end) for end, (*_, scored) in zip(ends, ranges, strict=True)]
    return [
        PositionRange(first, last, len(scored), float(kl[part].mean()),
                      None if expected is None else float(expected[part].mean()))
        for part, (first, last, scored) in zip(parts, ranges, strict=True)
    ]  # fmt: skip


def _window(tokenizer: PreTrainedTokenizerBase, text: Text, config: dict[str, Any]) -> tuple[NDArray[np.int64], str]:
    """Returns the token ids of the longest window, and what its length comes from."""
    tokens = tokenize(tokenizer, text.seen_by(tokenizer))
    trained = trained_positions(config)
    limits = {"the length of the text": len(tokens), "free memory": _tokens_in_memory(config)}
    limits |= {"the length that the model was trained on": trained} if trained else {}
    because = min(limits, key=lambda name: limits[name])
    window = tokens[: limits[because]].copy()
    if len(window) and begins_with_bos(tokenizer):
        window[0] = tokenizer.bos_token_id
    return window, because


def _tokens_in_memory(config: dict[str, Any]) -> int:
    """Returns how many tokens fit into half of the free memory: hidden states, one block's activations, llama.cpp's
    keys and values, a mask of all pairs of positions, and the logits of the scored positions of three models."""
    free = psutil.virtual_memory().available / 2
    hidden, inner = config.get("hidden_size") or 1, config.get("intermediate_size") or 1
    cache = 4 * config.get("num_hidden_layers", 1) * head_count(config, "num_key_value_heads") * head_dim(config)
    tokens = 1 << 24
    while tokens > LEAST:
        logits = 12 * SCORED * tokens.bit_length() * (config.get("vocab_size") or 1)
        if tokens * (4 * (10 * hidden + 4 * inner) + cache) + tokens * tokens + logits <= free:
            break
        tokens = tokens * 3 // 4
    return tokens


def _ranges(length: int) -> list[tuple[int, int, NDArray[np.int64]]]:
    """Returns (first, last, scored positions) of every range between powers of two, up to the last that predicts."""
    ranges, first = [], 1
    while first < length - 1:
        last = min(2 * first, length - 1) - 1
        scored = np.linspace(first, last, min(SCORED, last - first + 1)).round().astype(np.int64)
        ranges.append((first, last, scored))
        first *= 2
    return ranges


def _logits_of_file(
    result: Verification, export: Weights, factors: LowRankFactors | None, window: NDArray[np.int64],
    positions: NDArray[np.int64], listener: Listener,
) -> torch.Tensor:  # fmt: skip
    if result.engine == "llama.cpp":
        listener.stage("Run the file, long window", 0)
        with in_llamacpp(result, len(window), Path(str(result.adapter)) if factors else None) as engine:
            return torch.from_numpy(engine.logits_at(window.tolist(), positions.tolist()))
    return _logits(model_of_file(result, export, factors), window, positions, listener, "file")


def _logits(
    model: BlockModel, window: NDArray[np.int64], positions: NDArray[np.int64], listener: Listener, name: str
) -> torch.Tensor:
    """Returns the logits [positions, vocabulary] of a model at some positions of a window, on the CPU."""
    protocol = Protocol("long window", window=len(window), first=1, bos=False)
    (states,) = block_logits(model, window[None], protocol, listener, f"Run the {name}, long window").hidden
    parts = [model.logits(states[:, rows])[0].cpu() for rows in torch.from_numpy(positions).split(ROWS)]
    return torch.cat(parts)


def _divergence(
    reference: torch.Tensor, test: torch.Tensor, window: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    return evaluate.score(reference, test, torch.from_numpy(window[positions + 1])).divergence


def check_long_window(result: Verification) -> None:
    """Fails a file whose late positions lose more than `max_over_expected` times what rounding costs there.

    What the early positions lose beyond that is allowed to the late ones too: it is another fault, or another text.
    """
    factor = result.limits.get("max_over_expected")
    if result.long is None or factor is None:
        return
    judged = [(entry, entry.expected) for entry in result.long.ranges if entry.first >= EARLY and entry.expected]
    if not judged:
        return
    (first, costs), *late = judged
    allowed = factor * max(1.0, first.kl / (costs + FLOOR))
    wrong = [(entry, costs) for entry, costs in late if entry.kl > allowed * costs + FLOOR]
    if wrong:
        worst, costs = wrong[0]
        result.failed.append(
            f"From position {worst.first} of a long window on, mean KL divergence is {worst.kl:.4g} up to position "
            f"{worst.last}, where rounding the source to the file's types costs {costs:.4g}, and it is "
            f"{first.kl:.4g} at positions {first.first} to {first.last}: the rotation (rope), its scaling, "
            "a sliding window or the context may be wrong."
        )
