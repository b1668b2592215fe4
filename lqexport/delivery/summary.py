"""The summary that an export prints at its end: size, loss, time, and the commands that come next."""

from __future__ import annotations

import shlex

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lqexport.delivery.deliver import Delivery
from lqexport.evaluation.figures import figure, share, with_error
from lqexport.sizes import human_bytes
from lqexport.verification.report import verdict
from lqexport.verification.result import Verification
from lqexport.verification.usage import commands


def summary(delivery: Delivery) -> RenderableType:
    """Returns the result that `lqexport export` prints: a table of figures, warnings and failures."""
    result = delivery.verification
    table = Table(box=None, show_header=False, pad_edge=False)
    for label, value in _facts(delivery):
        table.add_row(Text(label), Text(value))
    lines = [Text(f"warning: {sentence}", style="yellow") for sentence in result.warnings]
    lines += [Text(f"failed: {sentence}", style="red") for sentence in result.failed]
    lines += [Text(f"likely: {sentence}", style="red") for sentence in result.causes]
    lines.append(Text(f"result: {verdict(result)}", style="bold" if delivery.passed else "bold red"))
    return Group(Text(), table, Text(), *lines)


def _facts(delivery: Delivery) -> list[tuple[str, str]]:
    result = delivery.verification
    steps = ", ".join(f"{step} {duration(seconds)}" for step, seconds in delivery.seconds.items())
    return [
        ("file", str(delivery.path)),
        *([("low-rank corrections", str(delivery.adapter))] if delivery.adapter else []),
        ("target", delivery.target),
        ("size", f"{human_bytes(result.nbytes)}, {result.bits_per_weight:.3f} bits per weight"),
        *_loss(result),
        ("time", f"{duration(sum(delivery.seconds.values()))}: {steps}"),
    ]


def _loss(result: Verification) -> list[tuple[str, str]]:
    if result.similarity:
        cosine = with_error(result.similarity.cosine, result.similarity.cosine_error)
        return [("cosine", f"{cosine} to the source's embeddings, {result.similarity.sentences} sentences")]
    if not result.evaluations:
        return []
    loss = result.evaluations[0]
    return [
        ("KL divergence", f"{with_error(loss.kl, loss.kl_error, 5)} nats per token"),
        ("perplexity", f"{figure(loss.perplexity)}; the source's {figure(loss.reference_perplexity)}"),
        ("same top token", share(loss.top1)),
        ("measured on", f"{loss.windows} windows of {result.text}, in {result.engine}"),
    ]


def duration(seconds: float) -> str:
    """Returns a time as text in two units: `12 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def next_steps(delivery: Delivery) -> list[str]:
    """Returns one line for each thing that the user may want to do now. They hold commands, so they are not folded."""
    lines = [f"Record:  {delivery.record} (model card, report, verification.json)"]
    if delivery.artifact:
        lines.append(f"Artifact: {delivery.artifact}")
    if not delivery.passed:
        return [*lines, "The same command with other limits verifies again, and quantizes nothing again."]
    family = delivery.target.partition(":")[0]
    adapter = str(delivery.adapter) if delivery.adapter else None
    usage = commands(str(delivery.path), family, adapter, encoder=delivery.verification.similarity is not None)
    lines += [f"Run:     {command}" for command in usage]
    push = ["lqexport", "push-to-hub", str(delivery.path), "YOU/NAME", "--record", str(delivery.record)]
    return [*lines, f"Publish: {shlex.join(push)}"]
