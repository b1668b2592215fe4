"""Shows a verification as a table for the terminal and as one HTML page that needs no network."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lqexport.converters.factors import is_factor
from lqexport.errors import UserError, install
from lqexport.evaluation.embeddings import NEIGHBOURS
from lqexport.evaluation.figures import figure, share, with_error
from lqexport.sizes import human_bytes
from lqexport.storage.files import written_whole
from lqexport.verification import talk_report
from lqexport.verification.limits import LIMITS
from lqexport.verification.long_record import LongWindow
from lqexport.verification.matrix_view import MatrixView
from lqexport.verification.result import ExpectedLoss, TensorCheck, Verification

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = f"The HTML report needs jinja2 and matplotlib: {install('report')}"
TEMPLATE = Path(__file__).with_name("report.html")
BLOCK = re.compile(r"\.(\d+)\.")
"""Matches the index of the decoder block in a tensor's name."""


def role_of(name: str) -> str:
    """Returns a tensor's role: its name without the block, so `mlp.up_proj` for `model.layers.3.mlp.up_proj.weight`."""
    inside = name[match.end() :] if (match := BLOCK.search(name)) else name.removeprefix("model.")
    return inside.removesuffix(".weight")


def block_of(name: str) -> int | None:
    """Returns the index of the decoder block that a tensor is in; None outside the blocks."""
    return int(match[1]) if (match := BLOCK.search(name)) else None


@dataclass(frozen=True)
class Role:
    """All tensors of one role: their number, their types, and the sums of their weights and bytes."""

    name: str
    count: int
    types: tuple[str, ...]
    weights: int
    nbytes: int


def roles(tensors: Iterable[TensorCheck]) -> list[Role]:
    """Groups tensors by role, the largest role first. Vectors (norms, biases) are one role."""
    groups: dict[str, list[TensorCheck]] = {}
    for tensor in tensors:
        groups.setdefault("norms and biases" if len(tensor.shape) == 1 else role_of(tensor.name), []).append(tensor)
    grouped = [
        Role(
            name,
            len(group),
            tuple(dict.fromkeys(tensor.codec for tensor in group)),
            sum(tensor.weights for tensor in group),
            sum(tensor.nbytes for tensor in group),
        )
        for name, group in groups.items()
    ]
    return sorted(grouped, key=lambda role: -role.nbytes)


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
    weights = sum(tensor.weights for tensor in result.tensors if not is_factor(tensor.name))
    return [
        ("tensors", f"{len(result.tensors)}, {weights / 1e6:.1f} million weights"),
        ("size", f"{human_bytes(result.nbytes)}, {result.bits_per_weight:.3f} bits per weight"),
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


def save_budget_plot(budget: dict[str, Any], path: Path) -> None:
    """Writes a plot of the least predicted KL over bytes, with the choice that was made, as an SVG file.

    `budget` is the content of budget.json.
    """
    content = svg(lambda axes: _draw_budget(axes, budget)).encode()
    with written_whole(path) as file:
        file.write(content)


def _draw_budget(axes: Axes, budget: dict[str, Any]) -> None:
    axes.plot([p["bytes"] / 1e6 for p in budget["curve"]], [p["loss"] for p in budget["curve"]], color="#4477aa")
    axes.plot(budget["tensor_bytes"] / 1e6, budget["predicted_kl"], "o", color="#cc3311", label="chosen")
    axes.set_yscale("log")
    axes.set_xlabel("MB of tensor data")
    axes.set_ylabel("predicted KL, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


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
        plots=[(title, note, jinja2.utils.markupsafe.Markup(svg)) for title, note, svg in plots(result)],
        facts=[*flat(result.run), *((f"version of {name}", version) for name, version in result.versions.items())],
    )


def flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Returns a nested dict as a list of (`outer.inner`, value as text)."""
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        lines += flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", str(item))]
    return lines


def plots(result: Verification) -> list[tuple[str, str, str]]:
    """Returns (title, explanation, SVG) for every plot that has something to show."""
    drawn: list[tuple[str, str, str]] = []
    for title, note, attribute in (
        ("Output error by block", "Energy of each linear's output error relative to its output, on the calibration "
         "tokens, as the run recorded it.", "output_error"),
        ("Weight error by block", "Energy of the difference between the file's and the source's weights, relative to "
         "the source's.", "weight_error"),
    ):  # fmt: skip
        lines = by_block(result.tensors, attribute)
        if any(value > 0 for points in lines.values() for _, value in points):
            drawn.append((title, note, svg(partial(_draw_by_block, lines=lines))))
    if result.tensors:
        note = "All tensors of a kind together, with their types."
        drawn.append(("Bytes by kind of tensor", note, svg(lambda axes: _draw_roles(axes, roles(result.tensors)))))
    if any(finite(evaluation.kl_by_window) for evaluation in result.evaluations):
        note = "Mean over the scored tokens of each window, in the order of the text."
        drawn.append(("KL divergence along the text", note, svg(lambda axes: _draw_windows(axes, result))))
        note = "Mean over all windows by the position of the token in its window."
        drawn.append(("KL divergence within a window", note, svg(lambda axes: _draw_positions(axes, result))))
    if (matrix := result.portrait) is not None:
        note = (
            f"{matrix.codec}. All weights of the source and of the file, and below the axis the values that row "
            f"{matrix.row} of the file uses."
        )
        drawn.append((f"Weights of {matrix.name}", note, svg(lambda axes: _draw_matrix(axes, matrix))))
    return drawn


def finite(values: list[float]) -> bool:
    """Returns whether there are values and all of them are finite."""
    return bool(values) and all(map(math.isfinite, values))


def by_block(tensors: list[TensorCheck], attribute: str) -> dict[str, list[tuple[int, float]]]:
    """Returns a matrix's role -> (block, error) for the matrices whose `attribute` (the error) is positive and finite.

    A logarithmic axis shows no other values.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for tensor in tensors:
        block, value = block_of(tensor.name), getattr(tensor, attribute)
        if block is not None and len(tensor.shape) == 2 and value is not None and 0 < value < math.inf:
            lines.setdefault(role_of(tensor.name), []).append((block, value))
    return lines


def svg(draw: Callable[[Axes], None]) -> str:
    """Returns a plot as an <svg> element.

    Text stays text. Ids depend on the content only, so equal plots have equal bytes.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "lqexport", "font.family": "sans-serif", "font.size": 9}
    with rc_context(style | {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888"}):
        drawing = Figure(figsize=(7.2, 3.0), layout="constrained")
        draw(drawing.subplots())
        file = io.StringIO()
        drawing.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    content = file.getvalue()
    # The XML prologue may not stand inside a page, and the metadata names web addresses.
    return re.sub(r"<metadata>.*?</metadata>", "", content[content.index("<svg") :], flags=re.DOTALL)


def _draw_by_block(axes: Axes, lines: dict[str, list[tuple[int, float]]]) -> None:
    for (name, points), marker in zip(lines.items(), "osD^v<>ph*" * len(lines), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, linewidth=1, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("decoder block")
    axes.set_ylabel("relative error")
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _draw_matrix(axes: Axes, matrix: MatrixView) -> None:
    axes.stairs(matrix.source, matrix.edges, fill=True, color="#bbccdd", label="source")
    axes.stairs(matrix.file, matrix.edges, color="#cc3311", label="file")
    axes.plot(
        matrix.levels, [-0.04 * max(matrix.source)] * len(matrix.levels), "|", color="#333", label="a row's values"
    )
    axes.set_xlabel("weight")
    axes.set_ylabel("weights")
    axes.legend(frameon=False, fontsize=8)


def _draw_roles(axes: Axes, all_roles: list[Role]) -> None:
    names = [role.name for role in all_roles][::-1]
    bars = axes.barh(names, [role.nbytes / 1e6 for role in all_roles][::-1], color="#4477aa")
    labels = [", ".join(name.removeprefix("gguf:") for name in role.types) for role in all_roles][::-1]
    axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_xlabel("MB")
    axes.margins(x=0.2)


def _draw_windows(axes: Axes, result: Verification) -> None:
    for evaluation in result.evaluations:
        count = len(evaluation.kl_by_window)
        axes.plot(range(1, count + 1), evaluation.kl_by_window, marker="o", markersize=3, label=evaluation.protocol)
    axes.locator_params(axis="x", integer=True)
    _finish_kl(axes, "window")


def _draw_positions(axes: Axes, result: Verification) -> None:
    for evaluation in result.evaluations:
        values = evaluation.kl_by_position
        axes.plot([(i + 0.5) / len(values) for i in range(len(values))], values, label=evaluation.protocol)
    _finish_kl(axes, "position among the window's scored tokens (0: first, 1: last)")


def _finish_kl(axes: Axes, label: str) -> None:
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("mean KL, nats")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
