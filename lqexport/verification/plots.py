"""Draws plots as SVG: those of a report page, and the curve of a choice of types by size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqexport.storage.files import written_whole
from lqexport.verification.matrix_view import MatrixView
from lqexport.verification.result import TensorCheck, Verification
from lqexport.verification.roles import Role, block_of, role_of, roles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
