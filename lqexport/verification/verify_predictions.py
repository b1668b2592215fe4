"""Compares a written model's predictions with its source's: logits on windows of a text, or an encoder's embeddings.

Where llama.cpp runs the file, its tokenizer is compared too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lqexport.calibration.texts import Text
from lqexport.converters.models.architectures import architecture_of
from lqexport.evaluation import evaluate
from lqexport.evaluation.activations import rounding
from lqexport.evaluation.embeddings import embeddings, engine_embeddings, sentences, similarity, token_ids
from lqexport.evaluation.engine_process import EngineFailed
from lqexport.evaluation.fitting import fitted, window_warnings
from lqexport.evaluation.llamacpp_process import LlamaCppProcess
from lqexport.evaluation.logits import block_logits, engine_logits
from lqexport.evaluation.mlx_process import MlxProcess
from lqexport.evaluation.protocols import PROTOCOLS, Protocol, cut_text
from lqexport.models.adapters import LowRankFactors, corrected
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.models.source import Source
from lqexport.models.source_view import folder_of
from lqexport.models.tokenizers import Splits
from lqexport.runtime.progress import Listener
from lqexport.verification.expected_loss import expected_loss
from lqexport.verification.matrix_view import in_context
from lqexport.verification.result import Verification
from lqexport.verification.rounded_source import RoundedSource

TOKENIZER_LINES = 1000
"""How many lines of the text are compared."""
TOKENIZER_LIMIT = 0.01
"""Largest share of these lines that llama.cpp may split into other tokens than the source's tokenizer."""


def compare_predictions(
    result: Verification, export: Weights, factors: LowRankFactors | None, source: Source, *, text: Text,
    protocols: tuple[str, ...], windows: int | None, listener: Listener, rounded: RoundedSource | None = None,
) -> None:  # fmt: skip
    """Compares the file with its source on a text by every protocol, and stores the results in `result`.

    `windows` is the largest number of windows per protocol, or of sentences for an encoder. `rounded` is the source
    rounded to the file's types, to measure the expected loss with; None to leave that out. Where llama.cpp runs the
    file, its tokenizer is compared too. A file that its engine does not load or run fails.
    """
    listener.stage(f"Cut {text.name} into windows", 0)
    tokenizer = source.tokenizer()
    with engine_failures(result):
        if result.engine == "llama.cpp":
            check_tokenizer(result, Splits(tokenizer, folder_of(source)), text)
        if architecture_of(source.config).encoder:
            texts = sentences(text.content, windows)
            compare_embeddings(result, export, factors, source, texts=texts, tokenizer=tokenizer, listener=listener)
            return
        cut = cut_text(tokenizer, text, [fitted(PROTOCOLS[name], source.config) for name in protocols], windows)
        for name in protocols:
            result.warnings += window_warnings(PROTOCOLS[name], source.config)
        try:
            evaluate_file(result, export, factors, source, cut, listener, rounded)
        finally:
            if result.evaluations:
                result.worst = in_context(result.evaluations[0].worst, next(iter(cut.values())), tokenizer)


@contextlib.contextmanager
def engine_failures(result: Verification) -> Iterator[None]:
    """Makes a failed check of a file that llama.cpp or mlx-lm does not load or run."""
    try:
        yield
    except EngineFailed as failure:
        result.failed.append(str(failure))


@contextlib.contextmanager
def in_llamacpp(
    result: Verification, n_ctx: int, adapter: Path | None = None, embeddings: bool = False
) -> Iterator[LlamaCppProcess]:
    """Yields the file, loaded in llama.cpp in a child process, whose warnings become the result's.

    The arguments are those of `LlamaCppProcess`. Raises LlamaCppFailed as it does.
    """
    with LlamaCppProcess(Path(result.file), n_ctx, adapter=adapter, embeddings=embeddings) as engine:
        result.warnings += [sentence for sentence in engine.warnings if sentence not in result.warnings]
        yield engine


@contextlib.contextmanager
def logits_of_file(
    result: Verification,
    export: Weights,
    factors: LowRankFactors | None,
    windows: NDArray[np.int64],
    protocol: Protocol,
    listener: Listener,
) -> Iterator[Iterable[torch.Tensor]]:
    """Yields the file's logits, computed by the engine that `result` names, with the adapter if `factors` are given."""
    label = f"Run the file{' with its adapter' if factors else ''}, {protocol.name}"
    if result.engine == "llama.cpp":
        adapter = Path(str(result.adapter)) if factors else None
        with in_llamacpp(result, protocol.window, adapter) as engine:
            yield engine_logits(engine, windows, protocol)
    elif result.engine == "mlx":
        with MlxProcess(Path(result.file)) as folder:
            yield engine_logits(folder, windows, protocol)
    else:
        yield block_logits(model_of_file(result, export, factors), windows, protocol, listener, label)


def model_of_file(result: Verification, export: Weights, factors: LowRankFactors | None) -> BlockModel:
    """Returns the file's model by this program's own decoding, with the adapter if `factors` are given."""
    return BlockModel(
        corrected(export, factors), result.device, rounding=rounding(result.activations) if result.activations else None
    )


def evaluate_file(
    result: Verification,
    export: Weights,
    factors: LowRankFactors | None,
    source: Weights,
    windows: dict[Protocol, NDArray[np.int64]],
    listener: Listener,
    rounded: RoundedSource | None = None,
) -> None:
    """Evaluates the file by every protocol, with and without its adapter if it has one.

    The source runs in float32, by this program's own decoding. With `rounded`, the expected loss is measured too.
    """
    for protocol, cut in windows.items():
        # The file runs first, so that a file that does not load is known before the source has run.
        with logits_of_file(result, export, factors, cut, protocol, listener) as test:
            model = BlockModel(source, result.device)
            reference = block_logits(model, cut, protocol, listener, f"Run the source, {protocol.name}")
            result.evaluations.append(evaluate.compare(reference, test, cut, protocol, listener))
        if factors:
            with logits_of_file(result, export, None, cut, protocol, listener) as test:
                result.base_evaluations.append(evaluate.compare(reference, test, cut, protocol, listener))
        if rounded:
            file, measured = corrected(export, factors), result.evaluations[-1]
            loss = expected_loss(result, measured, file, rounded, reference, cut, protocol, listener)
            result.expected += [loss] if loss else []
    if rounded:
        compare_weights(result, rounded)


def compare_weights(result: Verification, rounded: RoundedSource) -> None:
    """Stores in each tensor's check how it compares with the rounded source's."""
    present = {tensor.name for tensor in result.tensors}
    for name in rounded.names():
        # Those that a model without loss did not need. expected_loss has said what cannot be rounded.
        if name in present and name not in rounded.errors:
            with contextlib.suppress(ValueError):
                rounded.read(name)
    result.tensors = [
        dataclasses.replace(
            tensor,
            rounding_error=rounded.errors.get(tensor.name),
            deviation=rounded.deviations.get(tensor.name),
        )
        for tensor in result.tensors
    ]


def compare_embeddings(
    result: Verification,
    export: Weights,
    factors: LowRankFactors | None,
    source: Weights,
    *,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    listener: Listener,
) -> None:
    """Compares an encoder's embeddings of the sentences `texts` with its source's.

    The source runs by this program's own decoding.
    """
    ids = token_ids(tokenizer, texts, source.config["max_position_embeddings"])
    if result.engine == "llama.cpp":
        with in_llamacpp(result, max(map(len, ids)), embeddings=True) as engine:
            embedded = engine_embeddings(engine, ids, listener)
    else:
        embedded = embeddings(model_of_file(result, export, factors), ids, listener, "Run the file")
    reference = embeddings(BlockModel(source, result.device), ids, listener, "Run the source")
    result.similarity = similarity(reference, embedded)


def check_tokenizer(result: Verification, expected: Splits, text: Text) -> None:
    """Compares how llama.cpp and the source's tokenizer split the first lines of the text.

    A wrong pre-tokenizer ruins a good file.
    A few lines may differ: llama.cpp's splitters disagree with the original on rare characters such as fractions.
    """
    lines = [line for line in text.content.split("\n") if line.strip()][:TOKENIZER_LINES]
    with in_llamacpp(result, n_ctx=32) as engine:
        different = [line for line in lines if not expected.agree(line, engine.tokenize(line))]
    if different:
        sentence = (
            f"llama.cpp splits {len(different)} of {len(lines)} lines of the text into other tokens than the source's "
            f"tokenizer, the first being {different[0][:60]!r}."
        )
        (result.failed if len(different) > TOKENIZER_LIMIT * len(lines) else result.warnings).append(sentence)
