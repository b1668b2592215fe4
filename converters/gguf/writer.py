"""Writes an artifact as a GGUF file. Planes are stored unchanged, but rows are put into llama.cpp's order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from lqexport.converters.factors import is_factor
from lqexport.converters.gguf.file import GGUFEntry, check_types, file_entry, type_of, write_tensors
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
from lqexport.errors import UserError
from lqexport.storage.artifact import Artifact


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
    config = normalized(artifact.config())
    architecture = architecture_of(config)
    check_supported(architecture, config)
    entries = _entries(artifact, architecture, config)
    writer = GGUFWriter(None, str(architecture.gguf))
    kept = read_kept(artifact.model_folder)
    name = kept_name(kept) or name_for_llamacpp(model_name(artifact.run()), artifact.model_folder)
    add_provenance(writer, artifact.run(), _main_type(entries), name)
    entries = add_numbers(writer, artifact, architecture, entries)
    rows = next(entry.shape[0] for entry in entries if entry.name == architecture.embedding)
    add_model(writer, architecture, config, rows, _further(artifact, architecture, config))
    if not kept:
        _add_tokenizer(writer, artifact.model_folder, rows)
    add_kept(writer, kept)
    zeros = filler_shapes(architecture, config["num_hidden_layers"], entries)
    return write_tensors(artifact, path, writer, entries, on_tensor, rope_factors(config), split_max_size, zeros)


def _add_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Adds the tokenizer of an artifact. An error says where its files are: a finished run need not be repeated."""
    try:
        add_tokenizer(writer, folder, rows)
    except UserError as error:
        raise UserError(f"{error} Its files are in {folder}: mend them there, and export again.") from error


def _main_type(entries: list[GGUFEntry]) -> str:
    """Returns the type that holds most bytes of the blocks' matrices."""
    total: Counter[str] = Counter()
    for entry in entries:
        if len(entry.shape) == 2 and entry.gguf_name.startswith("blk."):
            total[type_of(entry.codec_name)] += entry.nbytes
    return total.most_common(1)[0][0]


def _further(artifact: Artifact, architecture: Architecture, config: dict[str, Any]) -> int:
    """Returns the number of blocks of an artifact that predict further tokens, whatever config.json says."""
    return further_blocks(architecture, config["num_hidden_layers"], artifact.manifest())


def _entries(artifact: Artifact, architecture: Architecture, config: dict[str, Any]) -> list[GGUFEntry]:
    blocks = config["num_hidden_layers"] + _further(artifact, architecture, config)
    known = gguf_names(architecture, blocks)
    entries = []
    for name, facts in artifact.manifest().items():
        if is_factor(name):
            continue
        if name not in known:
            raise UserError(f"{artifact.folder} holds a tensor {name} that {architecture.gguf} does not have in GGUF.")
        order = row_order(architecture, config, name, facts["shape"][0])
        shape = gguf_shape(architecture, config, name, tuple(facts["shape"]))
        entries.append(file_entry(name, known[name], facts, order, shape))
    check_types(entries, artifact.folder, "Quantize again with a target gguf:TYPE.")
    if architecture.embedding not in {entry.name for entry in entries}:
        raise UserError(f"{artifact.folder} has no tensor {architecture.embedding}.")
    return entries
