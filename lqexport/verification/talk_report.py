"""Shows how a file talks: lines of facts, and the table of what source and file say."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from lqexport.errors import printable
from lqexport.verification.talk_record import Continuation, Rendering, StopToken, Talk


def facts(talk: Talk) -> list[tuple[str, str]]:
    """Returns (label, text) about the chat template, the stop tokens, what was said, and what was not checked."""
    lines = [("chat template", "; ".join([talk.template, *_renderings(talk)]))]
    if talk.stops:
        lines.append(("stop tokens", "; ".join(map(_stop, talk.stops))))
    if talk.continuations:
        same = sum(entry.difference is None for entry in talk.continuations)
        lines.append(("says the same", f"{same} of {len(talk.continuations)} times"))
    lines += [("not compared", sentence) for sentence in talk.left_out]
    return lines + [("not checked", sentence) for sentence in talk.not_checked]


def _renderings(talk: Talk) -> list[str]:
    """Returns how many conversations each renderer renders as the source does, and by which habits it differs."""
    sentences = []
    for renderer in dict.fromkeys(entry.renderer for entry in talk.renderings):
        group = [entry for entry in talk.renderings if entry.renderer == renderer]
        notes = list(dict.fromkeys(entry.note for entry in group if entry.note))
        same = sum(entry.same for entry in group)
        sentences.append("; ".join([f"{renderer} renders {same} of {len(group)} conversations alike", *notes]))
    return sentences


def _stop(token: StopToken) -> str:
    parts = ["named by the file" if token.in_file else "not named by the file"]
    if token.ends_turn:
        parts.insert(0, "ends a turn")
    if token.stops is not None:
        parts.append("stops llama.cpp" if token.stops else "does not stop llama.cpp")
    return f"{token.text} ({token.id}) {', '.join(parts)}"


def one_line(text: str) -> str:
    """Returns a text on one line, without anything that a terminal obeys."""
    return printable(text).replace("\n", "\\n")


def first_difference(entry: Continuation) -> str:
    """Returns where two continuations part, and how sure the source is there."""
    if entry.difference is None:
        return "none"
    return (
        f"token {entry.difference}: {one_line(entry.source_says)!r} ({entry.probability:.0%} by the source), "
        f"{one_line(entry.file_says)!r} ({entry.file_probability:.0%})"
    )


def different(talk: Talk) -> list[Rendering]:
    """Returns the renderings that differ from the source's."""
    return [entry for entry in talk.renderings if not entry.same]


def continuation_table(talk: Talk) -> Table:
    """Returns what source and file say after each prompt, side by side, for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for title in ("prompt", "the source says", "the file says", "first difference"):
        table.add_column(title, ratio=1, overflow="fold")
    for entry in talk.continuations:
        cells = (one_line(entry.prompt), one_line(entry.source), one_line(entry.file), first_difference(entry))
        table.add_row(*map(Text, cells))
    return table
