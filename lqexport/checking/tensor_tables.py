"""Compares the names of a file's tensors with gguf-py's table for its architecture, and with ours where we have one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from functools import cache

import gguf

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.converters.gguf.fused_experts import taken_apart
from lqexport.converters.gguf.numbers import with_numbers
from lqexport.converters.gguf.scales import APPLIED, matrix_of, scale_name
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.rope import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from lqexport.converters.models.tensor_names import gguf_names, needed_names
from lqexport.errors import listed

BLOCK = re.compile(r"^((?:enc\.|dec\.)?blk)\.(\d+)\.")
ENDS = (".weight", ".bias", ".scale", ".input_scale")


def check_tensors(file: OpenFile) -> Iterator[Problem]:
    """Yields the tensors that the architecture lacks or wants, and blocks beyond the number of blocks."""
    known = _known_names(file)
    if not known:
        yield warning("tensors", f"The architecture {file.architecture!r} is not known here.")
        return
    unknown = [name for name in file.tensors if _pattern(name) not in known]
    if unknown:
        sentence = f"{len(unknown)} tensors are not of the architecture {file.architecture}: {listed(unknown, 3)}."
        yield error("tensors", sentence, unless_loaded=True)
    if missing := missing_tensors(file):
        sentence = f"{len(missing)} tensors are missing that {file.architecture} has: {listed(missing, 3)}."
        yield error("tensors", sentence, unless_loaded=True)
    yield from _ignored_scales(file)
    yield from _blocks(file)


def _ignored_scales(file: OpenFile) -> Iterator[Problem]:
    """Yields the further scales of matrices that llama.cpp does not multiply by, for an architecture that is known."""
    if file.architecture not in APPLIED:
        return
    of_model = {name for entry in file.entries for name in entry.gguf_tensors.values()}
    scales = {scale_name(name): matrix_of(name) for name in file.tensors if BLOCK.match(name)}
    ignored = [
        name
        for name, matrix in scales.items()
        if name in file.tensors and matrix not in APPLIED[file.architecture] and f"{matrix}.scale" not in of_model
    ]
    if ignored:
        yield warning(
            "tensors",
            f"{len(ignored)} scales of whole matrices are ignored by the llama.cpp that lqexport knows (86a2835), so "
            f"the matrices are wrong there: {listed(ignored, 3)}.",
        )


def _known_names(file: OpenFile) -> Set[str]:
    """Returns the names that tensors of the architecture may have, with `*` for the block and without their ends."""
    ours = {_pattern(name) for entry in file.entries for name in entry.gguf_top.values()}
    for entry in file.entries:
        names = (*entry.gguf_block.values(), *entry.gguf_tensors.values(), *entry.predictor.values())
        ours |= {_pattern(f"blk.0.{name}") for name in names}
    return ours | _of_gguf(file.architecture) | ({ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS} if ours else set())


@cache
def _of_gguf(name: str) -> frozenset[str]:
    """Returns the same by gguf-py's table; empty where it does not know the architecture."""
    members = {text: member for member, text in gguf.MODEL_ARCH_NAMES.items()}
    if name not in members:
        return frozenset()
    tensors = gguf.MODEL_TENSORS[members[name]]
    return frozenset(_without_end(gguf.TENSOR_NAMES[tensor].replace("{bid}", "*")) for tensor in tensors)


def _pattern(name: str) -> str:
    return _without_end(BLOCK.sub(r"\1.*.", name))


def _without_end(name: str) -> str:
    for end in ENDS:
        name = name.removesuffix(end)
    return name


def missing_tensors(file: OpenFile) -> list[str]:
    """Returns the tensors that every model of the architecture has and the file lacks, by the entry that fits best."""
    by_entry = [_missing(file, entry) for entry in file.entries]
    return min(by_entry, key=len, default=[name for name in ("token_embd.weight",) if name not in file.tensors])


def _missing(file: OpenFile, entry: Architecture) -> list[str]:
    # Each block has at least one tensor. Without this limit, a damaged count would make billions of names.
    layers = min(file.count("block_count") or 0, len(file.tensors))
    names = gguf_names(entry, layers)
    needed = dict.fromkeys(names[name] for name in needed_names(entry, layers))
    present = with_numbers(taken_apart(file.tensors), file.metadata, [entry])
    return [name for name in needed if name not in present]


def _blocks(file: OpenFile) -> Iterator[Problem]:
    count = file.count("block_count")
    present = {int(match[2]) for name in file.tensors if (match := BLOCK.match(name)) and match[1] == "blk"}
    if count is None or not present:
        return
    if max(present) >= count:
        yield error("tensors", f"block_count is {count}, and there is a block with the number {max(present)}.")
    elif len(present) < count:
        yield error("tensors", f"block_count is {count}, and only {len(present)} blocks have tensors.")
