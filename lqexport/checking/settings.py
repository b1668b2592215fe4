"""Looks for settings in a file's metadata that no model has: counts of 0, a norm epsilon or rope base out of range."""

from __future__ import annotations

from collections.abc import Iterator

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning

COUNTS = ("block_count", "context_length", "embedding_length", "attention.head_count", "feed_forward_length")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
LEAST_EPSILON, MOST_EPSILON = 1e-12, 1e-3


def check_settings(file: OpenFile) -> Iterator[Problem]:
    """Yields missing and impossible settings."""
    if not file.architecture:
        yield error("settings", "The file has no general.architecture, which llama.cpp needs.")
        return
    yield from _counts(file)
    yield from _epsilon(file)
    yield from _heads(file)
    yield from _rope(file)
    yield from _experts(file)


def _counts(file: OpenFile) -> Iterator[Problem]:
    for key in COUNTS:
        value = file.get(key)
        if value is None:
            if file.entries:
                yield error("settings", f"There is no {file.architecture}.{key}.")
        elif isinstance(value, list):
            if not value or min(value) < 0:
                yield error("settings", f"{file.architecture}.{key} has no count for each block.")
        elif file.count(key) is None:
            yield error("settings", f"{file.architecture}.{key} is {value!r}, which is no count.")
    window = file.get("attention.sliding_window")
    if window is not None and (not isinstance(window, int) or window < 0):
        yield error("settings", f"{file.architecture}.attention.sliding_window is {window!r}, which is no count.")


def _epsilon(file: OpenFile) -> Iterator[Problem]:
    present = {key: file.get(key) for key in EPSILONS if file.get(key) is not None}
    if not present and file.entries:
        yield error("settings", f"There is no {file.architecture}.{EPSILONS[0]} and no {EPSILONS[1]}.")
    for key in present:
        value = file.number(key)
        # GGUF stores float32, whose 1e-3 is a little larger.
        if value is None or not LEAST_EPSILON * 0.999 <= value <= MOST_EPSILON * 1.001:
            yield error(
                "settings",
                f"{file.architecture}.{key} is {present[key]!r}; models have {LEAST_EPSILON:g} to {MOST_EPSILON:g}.",
            )


def _heads(file: OpenFile) -> Iterator[Problem]:
    heads, keys, hidden = (
        file.count(key) for key in ("attention.head_count", "attention.head_count_kv", "embedding_length")
    )
    if heads and keys and heads % keys:
        yield error("settings", f"{heads} query heads cannot share {keys} key-value heads evenly.")
    if heads and hidden and hidden % heads and file.get("attention.key_length") is None:
        yield error("settings", f"An embedding_length of {hidden} is not a multiple of {heads} heads.")


def _rope(file: OpenFile) -> Iterator[Problem]:
    for key in ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "rope.scaling.original_context_length"):
        value = file.get(key)
        if value is not None and not (file.number(key) or 0) > 0:
            yield error("settings", f"{file.architecture}.{key} is {value!r}; it must be above 0.")
    if (base := file.number("rope.freq_base")) and 0 < base < 100:
        yield warning("settings", f"{file.architecture}.rope.freq_base is {base:g}; models have 10000 and more.")
    rotated, width = file.count("rope.dimension_count"), file.count("attention.key_length")
    if rotated and (rotated % 2 or (width and rotated > width)):
        yield error(
            "settings", f"{rotated} columns of each head of {width} are rotated; it must be an even part of it."
        )


def _experts(file: OpenFile) -> Iterator[Problem]:
    experts, used = file.get("expert_count"), file.get("expert_used_count")
    if isinstance(experts, int) and experts > 0 and not (isinstance(used, int) and 0 < used <= experts):
        yield error("settings", f"{used!r} of {experts} experts are used for a token.")
