"""Writes an artifact as a GGUF file. Planes are stored unchanged, but rows are put into llama.cpp's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from lqexport.converters.factors import is_factor
from lqexport.converters.gguf.file import (
    FileContent,
    GGUFEntry,
    StoredModel,
    check_types,
    file_content,
    file_entry,
    type_of,
    write_content,
)
from lqexport.converters.gguf.fillers import filler_shapes
from lqexport.converters.gguf.kept import add_kept, kept_name, read_kept
from lqexport.converters.gguf.metadata import add_model, add_provenance, model_name
from lqexport.converters.gguf.numbers import add_numbers
from lqexport.converters.gguf.row_order import row_order
from lqexport.converters.gguf.support import check_supported
from lqexport.converters.gguf.tokenizer import add_tokenizer, name_for_llamacpp
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.further import further_blocks
from lqexport.converters.models.rope import rope_factors
from lqexport.converters.models.tensor_names import gguf_names, gguf_shape
from lqexport.errors import UserError, with_advice
from lqexport.storage.artifact import Artifact

NO_TOKENIZER = "no_vocab"
"""llama.cpp's name of the tokenizer of a file that has none."""


def write(
    artifact: Artifact,
    path: Path,
    on_tensor: Callable[[str, int], None] | None = None,
    split_max_size: int | None = None,
) -> list[Path]:
    """Writes a finished artifact to `path`, whole or not at all. Equal artifacts give equal bytes.

    Low-rank factors are left out; `converters.gguf.adapter.write` writes them.

    on_tensor        called with name and bytes after each tensor
    split_max_size   bytes of tensors that one file may hold; a larger model becomes several files (see `split.py`)

    Returns the files; llama.cpp and `GGUFModel` open the first. Raises UserError if the artifact is unfinished, damaged
    or not in GGUF codecs, if llama.cpp lacks what the model or its tokenizer needs, or if the disk is too small.
    """
    return write_content(artifact, path, content_of_artifact(artifact), on_tensor, split_max_size)


def content_of_artifact(artifact: Artifact) -> FileContent:
    """Returns what `write` writes. Raises UserError as it does.

    An error about the tokenizer says where its files are: a finished run need not be repeated.
    """
    mending = f"Its files are in {artifact.model_folder}: mend them there, and export again."
    return content_of(artifact, mending=mending)


def content_of(stored: StoredModel, *, mending: str = "", with_tokenizer: bool = True) -> FileContent:
    """Returns what the file of a finished or planned artifact holds.

    mending          the end of an error about the tokenizer: what the user can do
    with_tokenizer   whether the file gets the tokenizer of the model folder, or says that it has none

    Raises UserError if a tensor is not in a GGUF codec, or if llama.cpp lacks what the model or its tokenizer needs.
    """
    config = normalized(stored.config())
    architecture = architecture_of(config)
    check_supported(architecture, config)
    entries = _entries(stored, architecture, config)
    writer = GGUFWriter(None, str(architecture.gguf))
    kept = read_kept(stored.model_folder)
    name = kept_name(kept) or name_for_llamacpp(model_name(stored.run()), stored.model_folder)
    add_provenance(writer, stored.run(), _main_type(entries), name)
    entries = add_numbers(writer, stored, architecture, entries)
    rows = next(entry.shape[0] for entry in entries if entry.name == architecture.embedding)
    add_model(writer, architecture, config, rows, _further(stored, architecture, config))
    if not with_tokenizer:
        writer.add_tokenizer_model(NO_TOKENIZER)
    elif not kept:
        with with_advice(mending):
            add_tokenizer(writer, stored.model_folder, rows)
    add_kept(writer, kept)
    zeros = filler_shapes(architecture, config["num_hidden_layers"], entries)
    return file_content(writer, entries, rope_factors(config), zeros)


def _main_type(entries: list[GGUFEntry]) -> str:
    """Returns the type that holds most bytes of the blocks' matrices."""
    total: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) == 2 and entry.gguf_name.startswith("blk."):
            total[type_of(entry.codec_name)] += entry.nbytes
    return total.most_common(1)[0][0]


def _further(stored: StoredModel, architecture: Architecture, config: dict[str, Any]) -> int:
    """Returns the number of blocks of an artifact that predict further tokens, whatever config.json says."""
    return further_blocks(architecture, config["num_hidden_layers"], stored.manifest())


def _entries(stored: StoredModel, architecture: Architecture, config: dict[str, Any]) -> list[GGUFEntry]:
    blocks = config["num_hidden_layers"] + _further(stored, architecture, config)
    known = gguf_names(architecture, blocks)
    entries = []
    for name, facts in stored.manifest().items():
        if is_factor(name):
            continue
        if name not in known:
            raise UserError(f"{stored.folder} holds a tensor {name} that {architecture.gguf} does not have in GGUF.")
        order = row_order(architecture, config, name, facts["shape"][0])
        shape = gguf_shape(architecture, config, name, tuple(facts["shape"]))
        entries.append(file_entry(name, known[name], facts, order, shape))
    check_types(entries, stored.folder, "Quantize again with a target gguf:TYPE.")
    if architecture.embedding not in {entry.name for entry in entries}:
        raise UserError(f"{stored.folder} has no tensor {architecture.embedding}.")
    return entries
