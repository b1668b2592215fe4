"""`compare`: measures several written models against one source, and makes a table and a plot. The source runs once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from lqexport.calibration.texts import read_text
from lqexport.converters.counting import copied_output, counted, counted_linears
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError, files_at_hand
from lqexport.evaluation import evaluate
from lqexport.evaluation.evaluate import Evaluation
from lqexport.evaluation.figures import figure, finite_or_null, share, with_error
from lqexport.evaluation.fitting import fitted, window_warnings
from lqexport.evaluation.logits import BlockLogits, block_logits, check_predicts
from lqexport.evaluation.protocols import PROTOCOLS, Protocol, cut_text
from lqexport.models.adapters import LowRankFactors, open_factors
from lqexport.models.blocks import BlockModel
from lqexport.models.column_order import source_like
from lqexport.models.inspect import TensorInfo, inspect
from lqexport.models.source import Source, open_source
from lqexport.models.written import Export, open_export
from lqexport.runtime.environment import choose_device
from lqexport.runtime.progress import Listener, Silent
from lqexport.runtime.shown import Shown
from lqexport.sizes import human_bytes
from lqexport.storage.files import written_whole
from lqexport.verification.plots import svg
from lqexport.verification.result import Engine, Verification
from lqexport.verification.text_share import most_windows
from lqexport.verification.verify_predictions import logits_of_file
from lqexport.verification.verify_tensors import check_structure
from lqexport.verification.verify_vocabulary import vocabulary_differences
from lqexport.verification.verifying import check_adapter, check_options, empty_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Compared:
    """The measurements of one file. Bytes and bits per weight include scales, tables and low-rank factors.

    adapter                  the adapter that the file ran with; None if it ran as it is
    bits_per_weight          of all tensors, per weight of the source
    linears_bits_per_weight  of the decoder blocks' linears, without embedding and output
    tokens_per_second   number of tokens in the windows, divided by the seconds that the engine took for them. The time
                        of this program's own engine includes reading and decoding the file's tensors.
    """

    file: str
    sha256: str
    nbytes: int
    bits_per_weight: float
    linears_bits_per_weight: float
    tokens_per_second: float
    evaluation: Evaluation
    adapter: str | None = None


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """The measurements of all files, in the order given, on the same windows of the same text."""

    against: str
    text: str
    text_sha256: str
    protocol: str
    engine: str
    device: str
    files: list[Compared] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Returns all fields as JSON values; numbers that are not finite become null."""
        return finite_or_null(asdict(self))


@files_at_hand()
def compare(
    files: Sequence[str | Path],
    against: str,
    *,
    adapters: Sequence[str | Path] = (),
    text: str = "python-heldout",
    protocol: str = "llama.cpp-512",
    windows: int | None = None,
    engine: Engine = "lqexport",
    device: str = "auto",
    listener: Listener | None = None,
) -> Comparison:
    """Measures .gguf files, native folders, ExLlamaV2 folders and artifacts against one source.

    adapters   low-rank corrections of the first file, of the second, and so on: such a file is measured without them,
               and once more with them. There may be fewer adapters than files.

    The other options are those of `verifying.verify`. Raises UserError if a file cannot be read, lacks tensors of the
    source's architecture or has them in another shape, or if an adapter does not fit its file. All of this is checked
    before any model runs.
    """
    listener, paths = listener or Silent(), [Path(file) for file in files]
    if not paths:
        raise UserError("Give at least one file to compare.")
    if len(adapters) > len(paths):
        raise UserError(f"There are more adapters ({len(adapters)}) than files ({len(paths)}): a file has one at most.")
    pairs = list(zip_longest(paths, map(Path, adapters)))
    for path, adapter in pairs:
        check_options(path, (protocol,), windows, engine)
        check_adapter(adapter, engine)
    source, evaluation_text = open_source(against), read_text(text)
    device = str(choose_device(device))
    check_predicts(architecture_of(source.config))
    chosen = fitted(PROTOCOLS[protocol], source.config)
    cut = cut_text(source.tokenizer(), evaluation_text, [chosen], most_windows(windows, source.config))[chosen]
    opened = []
    for path, adapter in pairs:
        head = empty_result(path, source, None, evaluation_text, engine, device)
        opened += _opened(head, adapter, source, listener)
    for sentence in window_warnings(PROTOCOLS[protocol], source.config):
        listener.message(sentence)
    model = BlockModel(source, device)
    reference = block_logits(model, cut, chosen, listener, f"Run the source, {chosen.name}")
    comparison = Comparison(source.name, evaluation_text.name, evaluation_text.sha256, chosen.name, engine, device)
    comparison.files.extend(_compared(file, reference, cut, chosen, listener) for file in opened)
    return comparison


@dataclass(frozen=True)
class _Opened:
    """A file to measure, its result so far, its low-rank factors if it has any, and the source's config.json."""

    head: Verification
    export: Export
    factors: LowRankFactors | None
    config: dict[str, Any]


def _opened(head: Verification, adapter: Path | None, source: Source, listener: Listener) -> list[_Opened]:
    """Returns what to measure of a file: the file as it is and, if it has an adapter, the file with it.

    The listener is told where a GGUF file has another vocabulary than the source.
    """
    path = Path(head.file)
    export = open_export(path)
    source, name = source_like(source, export.config), source.name
    for sentence in vocabulary_differences(export, source):
        listener.message(f"{path}: {sentence}")
    opened = []
    for each in dict.fromkeys((None, adapter)):
        result = copy.deepcopy(head)
        result.adapter = str(each) if each else None
        factors = open_factors(path, each, source.config)
        if not check_structure(result, export, factors, source):
            wrong = f"{each} does not fit {path}" if each else f"{path} is not a model like {name}"
            raise UserError(f"{wrong}: {result.failed[0]}")
        opened.append(_Opened(result, export, factors, source.config))
    return opened


def _compared(
    opened: _Opened,
    reference: BlockLogits,
    windows: NDArray[np.int64],
    protocol: Protocol,
    listener: Listener,
) -> Compared:
    head, clock = opened.head, _Clock()
    began = time.perf_counter()
    with logits_of_file(head, opened.export, opened.factors, windows, protocol, listener) as test:
        if head.engine == "lqexport":  # has run the file by now; llama.cpp has only loaded it
            clock.seconds += time.perf_counter() - began
        evaluation = evaluate.compare(reference, clock.timed(test), windows, protocol, listener)
    for sentence in head.warnings:
        listener.message(f"{head.file}: {sentence}")
    entries = inspect(Path(head.file)).entries
    if head.adapter and opened.factors:
        entries += _entries(opened.factors)
    count = counted(entries, copied_output(opened.config))
    linears = counted_linears(entries, architecture_of(opened.config))
    rate = windows.size / max(clock.seconds, 1e-9)
    return Compared(
        head.file, head.sha256, count.nbytes, count.bits_per_weight, linears.bits_per_weight, rate, evaluation,
        head.adapter,
    )  # fmt: skip


def _entries(factors: LowRankFactors) -> list[TensorInfo]:
    """Returns the low-rank factors as `inspect` lists tensors."""
    tensors = [(name, *factors.planes(name)) for name in factors.names()]
    return [
        TensorInfo(name, shape, codec_name, sum(plane.nbytes for plane in planes.values()))
        for name, codec_name, planes, shape in tensors
    ]


class _Clock:
    """Sums up the seconds that iterators take to yield their items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, items: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        iterator = iter(items)
        while True:
            began = time.perf_counter()
            item = next(iterator, None)
            self.seconds += time.perf_counter() - began
            if item is None:
                return
            yield item


def table(comparison: Comparison) -> Table:
    """Returns the table that `lqexport compare` prints."""
    result = Table(box=None, pad_edge=False)
    result.add_column("file", overflow="fold")
    for title in ("size", "bits", "of linears", "perplexity", "ln(ratio)", "KL divergence", "same top", "tokens/s"):
        result.add_column(title, justify="right", no_wrap=True)
    first = comparison.files[0].evaluation
    reference = with_error(first.reference_perplexity, first.reference_perplexity_error, 3)
    result.add_row(f"{comparison.against} (source)", "", "", "", reference, "", "", "", "")
    for file in comparison.files:
        evaluation = file.evaluation
        result.add_row(
            f"{file.file} + {file.adapter}" if file.adapter else file.file,
            human_bytes(file.nbytes),
            f"{file.bits_per_weight:.3f}",
            f"{file.linears_bits_per_weight:.3f}",
            with_error(evaluation.perplexity, evaluation.perplexity_error, 3),
            with_error(evaluation.ln_ratio, evaluation.ln_ratio_error),
            with_error(evaluation.kl, evaluation.kl_error),
            share(evaluation.top1),
            figure(file.tokens_per_second),
        )
    return result


class Point(NamedTuple):
    """A file in the plot of losses: its bits per weight, and its mean KL divergence in nats with the standard error."""

    label: str
    bits: float
    kl: float
    kl_error: float


def save_plot(comparison: Comparison, path: Path) -> None:
    """Writes a plot of KL divergence over bits per weight as an SVG file."""
    points = [
        Point(
            f"{' + '.join(Path(path).name for path in (file.file, file.adapter) if path)}, {human_bytes(file.nbytes)}",
            file.bits_per_weight, file.evaluation.kl, file.evaluation.kl_error,
        )
        for file in comparison.files
    ]  # fmt: skip
    save_points(points, path)


def save_points(points: Sequence[Point], path: Path) -> None:
    """Writes a plot of the points, with KL divergence on a logarithmic axis, as an SVG file."""
    content = svg(lambda axes: _draw(axes, points)).encode()
    with written_whole(path) as file:
        file.write(content)


def _draw(axes: Axes, points: Sequence[Point]) -> None:
    for point, marker in zip(points, "osD^v<>ph*" * len(points), strict=False):
        if math.isfinite(point.kl):
            axes.errorbar(point.bits, point.kl, point.kl_error, marker=marker, linestyle="", label=point.label)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("mean KL, nats")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
