"""`compare`: several written models against one source, in one table and one plot. The source runs once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from lqexport.calibration.texts import read_text
from lqexport.errors import UserError
from lqexport.evaluation import evaluate
from lqexport.evaluation.evaluate import BlockLogits, Evaluation
from lqexport.evaluation.figures import figure, finite_or_null, share, with_error
from lqexport.models.adapters import LowRankFactors, open_factors
from lqexport.models.blocks import BlockModel
from lqexport.models.inspect import bits, inspect, size
from lqexport.models.source import Source, open_source
from lqexport.models.written import Export, open_export
from lqexport.runtime.environment import choose_device
from lqexport.runtime.progress import Listener, Silent
from lqexport.sizes import human_bytes
from lqexport.storage.files import written_whole
from lqexport.verification.report import svg
from lqexport.verification.result import Engine, Verification
from lqexport.verification.verify_predictions import cut_text, logits_of_file
from lqexport.verification.verify_tensors import check_structure
from lqexport.verification.verifying import begun, check_options

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Compared:
    """One file. Bytes and bits per weight count scales, tables and factors.

    tokens_per_second   tokens of the windows over the time that the engine took for them; ours reads and decodes the
                        file's tensors in it
    """

    file: str
    sha256: str
    nbytes: int
    bits_per_weight: float
    tokens_per_second: float
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparison:
    """All files, in the order in which they were given, on the same windows of the same text."""

    against: str
    text: str
    text_sha256: str
    protocol: str
    engine: str
    device: str
    files: list[Compared] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values; what is not finite becomes null."""
        return finite_or_null(asdict(self))


def compare(
    files: Sequence[str | Path],
    against: str,
    *,
    text: str = "python-heldout",
    protocol: str = "llama.cpp-512",
    windows: int | None = None,
    engine: Engine = "lqexport",
    device: str = "auto",
    listener: Listener | None = None,
) -> Comparison:
    """Measure .gguf files, native folders, folders of ExLlamaV2 and artifacts against one source; see
    `verifying.verify` for the options.

    Raises UserError where a file cannot be read, lacks tensors of the source's architecture or has them in another
    shape; that is known before anything runs.
    """
    listener, paths = listener or Silent(), [Path(file) for file in files]
    if not paths:
        raise UserError("Give at least one file to compare.")
    for path in paths:
        check_options(path, (protocol,), windows, engine)
    source, evaluated = open_source(against), read_text(text)
    device = str(choose_device(device))
    opened = [_opened(begun(path, source, None, evaluated, engine, device), source) for path in paths]
    ((chosen, cut),) = cut_text(source.tokenizer(), evaluated, (protocol,), windows).items()
    model = BlockModel(source, device)
    reference = evaluate.block_logits(model, cut, chosen, listener, f"Run the source, {protocol}")
    found = Comparison(source.name, evaluated.name, evaluated.sha256, protocol, engine, device)
    found.files.extend(_compared(each, reference, cut, chosen, listener) for each in opened)
    return found


@dataclass(frozen=True)
class _Opened:
    head: Verification
    export: Export
    factors: LowRankFactors | None


def _opened(head: Verification, source: Source) -> _Opened:
    path = Path(head.file)
    export, factors = open_export(path), open_factors(path, None, source.config)
    if not check_structure(head, export, factors, source):
        raise UserError(f"{path} is not a model like {source.name}: {head.failed[0]}")
    return _Opened(head, export, factors)


def _compared(
    opened: _Opened,
    reference: BlockLogits,
    windows: NDArray[np.int64],
    protocol: evaluate.Protocol,
    listener: Listener,
) -> Compared:
    head, clock = opened.head, _Clock()
    began = time.perf_counter()
    with logits_of_file(head, opened.export, opened.factors, windows, protocol, listener) as test:
        if head.engine == "lqexport":  # which has run by now; llama.cpp has only loaded the file
            clock.seconds += time.perf_counter() - began
        evaluation = evaluate.compare(reference, clock.timed(test), windows, protocol, listener)
    entries = inspect(Path(head.file)).entries
    rate = windows.size / max(clock.seconds, 1e-9)
    return Compared(head.file, head.sha256, size(entries), bits(entries), rate, evaluation)


class _Clock:
    """Sums up the time that an iterator takes for its items."""

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


def table(found: Comparison) -> Table:
    """What `lqexport compare` prints."""
    result = Table(box=None, pad_edge=False)
    result.add_column("file", overflow="fold")
    for title in ("size", "bits", "perplexity", "ln(ratio)", "KL divergence", "same top", "tokens/s"):
        result.add_column(title, justify="right", no_wrap=True)
    first = found.files[0].evaluation
    reference = with_error(first.reference_perplexity, first.reference_perplexity_error, 3)
    result.add_row(f"{found.against} (source)", "", "", reference, "", "", "", "")
    for file in found.files:
        each = file.evaluation
        result.add_row(
            file.file,
            human_bytes(file.nbytes),
            f"{file.bits_per_weight:.3f}",
            with_error(each.perplexity, each.perplexity_error, 3),
            with_error(each.ln_ratio, each.ln_ratio_error),
            with_error(each.kl, each.kl_error),
            share(each.top1),
            figure(file.tokens_per_second),
        )
    return result


def save_plot(found: Comparison, path: Path) -> None:
    """KL divergence over bits per weight, as an SVG file."""
    content = svg(lambda axes: _draw(axes, found)).encode()
    with written_whole(path) as file:
        file.write(content)


def _draw(axes: Axes, found: Comparison) -> None:
    for file, marker in zip(found.files, "osD^v<>ph*" * len(found.files), strict=False):
        each = file.evaluation
        if math.isfinite(each.kl):
            label = f"{Path(file.file).name}, {human_bytes(file.nbytes)}"
            axes.errorbar(file.bits_per_weight, each.kl, each.kl_error, marker=marker, linestyle="", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("mean KL, nats")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
