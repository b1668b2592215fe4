"""Looks for settings in a file's metadata that no model has.

These are counts of 0, a norm epsilon or rope base out of range, and sizes that contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.converters.models.architecture import Architecture

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
    if not file.entries or any(entry.attends for entry in file.entries):
        yield from _heads(file)
        yield from _latent_heads(file)
        yield from _rope(file)
    yield from _experts(file)


def _counts(file: OpenFile) -> Iterator[Problem]:
    for key in COUNTS:
        value = file.get(key)
        if not value and file.entries and not any(_has(entry, key) for entry in file.entries):
            continue  # llama.cpp's converter writes 0, or no such key
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


def _has(entry: Architecture, key: str) -> bool:
    """Returns whether a model of an architecture has what a count counts."""
    of_modules = {"attention.head_count": entry.attends, "feed_forward_length": entry.has_mlps}
    return of_modules.get(key, True)


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


def _latent_heads(file: OpenFile) -> Iterator[Problem]:
    """Yields head sizes and counts that llama.cpp's attention by latent vectors does not have."""
    if not any(entry.latent for entry in file.entries):
        return
    is_absorbed = file.get("attention.key_length_mla") is not None
    heads, keys, length = (file.get(f"attention.{key}") for key in ("head_count", "head_count_kv", "key_length"))
    rank, rotated = file.count("attention.kv_lora_rank"), file.count("rope.dimension_count")
    expected = 1 if is_absorbed else heads
    counts = [count for count in keys if count] if isinstance(keys, list) else [keys]
    if wrong := [count for count in counts if count not in (None, expected)]:
        yield error(
            "settings", f"There are {wrong[0]} key-value heads, and attention by latent vectors has {expected}."
        )
    if is_absorbed and length and rank and rotated and length != rank + rotated:
        yield error("settings", f"attention.key_length is {length}, not the {rank} + {rotated} of a latent vector.")


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
    elif rotated and width and rotated != width and file.entries and all(map(_rotates_all, file.entries)):
        sentence = f"{rotated} columns of each head of {width} are rotated, and {file.architecture} rotates all."
        yield error("settings", sentence, unless_loaded=True)


def _rotates_all(entry: Architecture) -> bool:
    return bool(entry.rope_types) and not entry.partial and not entry.latent


def _experts(file: OpenFile) -> Iterator[Problem]:
    experts, used = file.get("expert_count"), file.get("expert_used_count")
    if isinstance(experts, int) and experts > 0 and not (isinstance(used, int) and 0 < used <= experts):
        yield error("settings", f"{used!r} of {experts} experts are used for a token.")
    groups, chosen = file.count("expert_group_count"), file.count("expert_group_used_count")
    if not isinstance(experts, int) or not groups or groups == 1:
        return
    if experts % groups or experts // groups < 2:
        yield error("settings", f"{experts} experts are no {groups} groups of equal size, of 2 or more.")
    elif not chosen or chosen >= groups:
        yield error("settings", f"{chosen or 0} of {groups} groups of experts are used; it must be a part of them.")
