"""Shows a verification as a table for the terminal and as one HTML page that needs no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lqexport.errors import UserError, install
from lqexport.evaluation.embeddings import NEIGHBOURS
from lqexport.evaluation.figures import figure, share, with_error
from lqexport.sizes import human_bytes
from lqexport.storage.files import written_whole
from lqexport.verification import talk_report
from lqexport.verification.limits import LIMITS
from lqexport.verification.long_record import LongWindow
from lqexport.verification.plots import plots
from lqexport.verification.result import ExpectedLoss, Verification
from lqexport.verification.roles import roles

MISSING = f"The HTML report needs jinja2 and matplotlib: {install('report')}"
TEMPLATE = Path(__file__).with_name("report.html")


ROWS: dict[str, Callable[[Any], str]] = {
    "windows (scored tokens)": lambda result: f"{result.windows} ({result.tokens})",
    "perplexity of the source": lambda result: with_error(
        result.reference_perplexity, result.reference_perplexity_error
    ),
    "perplexity of the file": lambda result: with_error(result.perplexity, result.perplexity_error),
    "ratio": lambda result: with_error(result.perplexity_ratio, result.perplexity_ratio * result.ln_ratio_error),
    "ln(ratio)": lambda result: with_error(result.ln_ratio, result.ln_ratio_error),
    "mean KL divergence": lambda result: with_error(result.kl, result.kl_error, 5),
    "KL divergence, 99 % of tokens below": lambda result: figure(result.kl_99),
    "KL divergence, largest": lambda result: figure(result.kl_max),
    "same top token": lambda result: share(result.top1),
}
"""Label -> the text shown for an `Evaluation`."""


ENCODER_ROWS: dict[str, Callable[[Any], str]] = {
    "sentences": lambda result: str(result.sentences),
    "mean cosine to the source's embedding": lambda result: with_error(result.cosine, result.cosine_error),
    "least cosine": lambda result: figure(result.cosine_least),
    f"of the {NEIGHBOURS} nearest, the same": lambda result: with_error(result.recall, result.recall_error),
    "same nearest": lambda result: share(result.top1),
    f"Kendall's tau of the {NEIGHBOURS} nearest": lambda result: with_error(result.kendall, result.kendall_error),
}
"""Label -> the text shown for an encoder's `Similarity`."""


def measures(result: Verification) -> list[tuple[str, list[str]]]:
    """Returns (label, the text shown in each of the result's columns) for every row of the table of measurements."""
    rows = ENCODER_ROWS if result.similarity else ROWS
    return [(label, [show(column) for _, column in result.columns]) for label, show in rows.items()]


def checks(result: Verification) -> list[tuple[str, str]]:
    """Returns (label, text) for the checks of the file's tensors: number, size, finite values, digests,
    what its types should cost, and how it talks."""
    compared = [tensor for tensor in result.tensors if tensor.same_bytes is not None]
    same = sum(tensor.same_bytes is True for tensor in compared)
    digests = f"{same} of {len(compared)} tensors are the artifact's" if compared else "no artifact given"
    return [
        ("tensors", f"{len(result.tensors)}, {(result.weights or 0) / 1e6:.1f} million weights"),
        ("size", f"{human_bytes(result.nbytes)}, {result.bits_per_weight:.3f} bits per weight"),
        ("linears of the blocks", f"{result.linears_bits_per_weight or 0:.3f} bits per weight"),
        ("finite", f"{sum(tensor.finite for tensor in result.tensors)} of {len(result.tensors)} tensors"),
        ("digests", digests),
        *((f"expected loss, {loss.protocol}", _expectation(loss)) for loss in result.expected),
        *(talk_report.facts(result.talk) if result.talk else []),
    ]


def _expectation(loss: ExpectedLoss) -> str:
    return (
        f"KL {figure(loss.expected)} by rounding the source to the file's types; the file loses "
        f"{figure(loss.measured)} on the same {loss.windows} windows"
    )


def verdict(result: Verification) -> str:
    """Returns whether the file passed, in words."""
    if result.failed:
        return "FAILED"
    return "passed" if result.limits else "no fault found; no limit was set"


def for_terminal(result: Verification) -> RenderableType:
    """Returns what `lqexport verify` prints."""
    head = Table(box=None, show_header=False, pad_edge=False)
    facts = [("file", result.file), ("against", result.against), ("engine", result.engine), ("text", result.text)]
    if result.adapter:
        facts.insert(1, ("adapter", result.adapter))
    if result.activations:
        facts.append(("activations", f"{result.activations}, emulated"))
    facts.append(("decoded by", result.decoding))
    for label, value in [*facts, *checks(result)]:
        head.add_row(Text(label), Text(value))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title, _ in result.columns:
        table.add_column(title, justify="right")
    for label, values in measures(result):
        table.add_row(Text(label), *map(Text, values))
    lines = [Text(f"warning: {sentence}", style="yellow") for sentence in result.warnings]
    lines += [Text(f"failed: {sentence}", style="red") for sentence in result.failed]
    lines += [Text(f"likely: {sentence}", style="red") for sentence in result.causes]
    lines.append(Text(f"result: {verdict(result)}", style="bold red" if result.failed else "bold"))
    numbers: list[RenderableType] = [table, Text()] if result.columns else []
    if result.long:
        numbers += [Text(long_title(result.long)), _long_table(result.long), Text()]
    if result.talk and result.talk.continuations:
        numbers.append(talk_report.continuation_table(result.talk))
    return Group(head, Text(), *numbers, *lines)


def _long_table(long: LongWindow) -> Table:
    """Returns the losses by position in a long window, for the terminal."""
    table = Table(box=None, pad_edge=False)
    for heading in ("positions", "scored", "mean KL", "by rounding"):
        table.add_column(heading, justify="right")
    for entry in long.ranges:
        costs = "" if entry.expected is None else figure(entry.expected)
        table.add_row(f"{entry.first} to {entry.last}", str(entry.positions), figure(entry.kl), costs)
    return table


def long_title(long: LongWindow) -> str:
    """Returns what the length of a long window is, and what it comes from."""
    return f"one window of {long.tokens} tokens ({long.because})"


def save_html(result: Verification, path: Path) -> None:
    """Writes the HTML page to `path`, whole or not at all. Raises UserError if the extra `report` is not installed."""
    content = as_html(result).encode()
    with written_whole(path) as file:
        file.write(content)


def is_installed() -> bool:
    """Returns whether the packages that the page needs are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("jinja2", "matplotlib"))


def check_installed() -> None:
    """Raises UserError if a package that the page needs is not installed. Callers check before long work."""
    if not is_installed():
        raise UserError(MISSING)


def as_html(result: Verification) -> str:
    """Returns the HTML page. Its plots are inside it; it has no script and fetches nothing.

    It names no path of this machine. Raises UserError if the extra `report` is not installed.
    """
    check_installed()
    import jinja2

    result = result.published()

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": human_bytes, "figure": figure, "share": share}
    environment.filters |= {"long_title": long_title}
    environment.filters |= {"first_difference": talk_report.first_difference, "different": talk_report.different}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        result=result,
        verdict=verdict(result),
        limit_names=LIMITS,
        measures=measures(result),
        checks=checks(result),
        roles=roles(result.tensors),
        # The plots' SVG is ours, so it is not escaped. Everything else on the page is.
        plots=[(title, note, jinja2.utils.markupsafe.Markup(drawing)) for title, note, drawing in plots(result)],
        facts=[*flat(result.run), *((f"version of {name}", version) for name, version in result.versions.items())],
    )


def flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns a nested dict as a list of (`outer.inner`, value as text)."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        lines += flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", str(item))]
    return lines
