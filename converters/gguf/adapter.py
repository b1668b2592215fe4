"""Writes and reads low-rank corrections as a GGUF LoRA adapter.

llama.cpp loads the adapter beside the base model and computes W x + B (A x) at run time. The file holds:

    general.type "adapter", general.architecture of the base, adapter.type "lora", adapter.lora.alpha 0
    blk.0.attn_q.weight.lora_a   [k, columns]      blk.0.attn_q.weight.lora_b   [rows, k]

llama.cpp multiplies the correction by alpha / k, or by 1 where alpha is 0. With alpha 0, each linear can have another
rank, and B holds the whole scale. The rows of B are in the order of the base linear's rows: for q and k, that is
llama.cpp's rope order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from lqexport.converters.factors import B, check_present, corrected_linear, factor_names, is_factor
from lqexport.converters.gguf.file import check_types, file_content, file_entry, write_content
from lqexport.converters.gguf.header import read_header
from lqexport.converters.gguf.row_order import row_order
from lqexport.converters.gguf.support import check_supported
from lqexport.converters.models.architecture import Order
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec_named, names
from lqexport.storage.artifact import Artifact
from lqexport.storage.published import public_run

SUFFIXES = (".lora_a", ".lora_b")


def check_asked(artifact: Artifact, asked: bool) -> None:
    """Raises UserError if an adapter is asked for but the artifact has no corrections, or the other way round."""
    if asked:
        check_present(artifact)
    elif any(is_factor(name) for name in artifact.manifest()):
        raise UserError(
            f"{artifact.folder} holds low-rank corrections, which a GGUF model has no place for: give --adapter FILE, "
            "and load that file with --lora."
        )


def write(artifact: Artifact, path: Path, on_tensor: Callable[[str, int], None] | None = None) -> None:
    """Writes the low-rank corrections of a finished artifact to `path`, whole or not at all.

    on_tensor   called with name and bytes after each tensor

    Raises UserError if the artifact has no corrections or is damaged, if a low-rank factor is not in a GGUF type, if
    the model has experts, or if the disk is too small.
    """
    config = normalized(artifact.config())
    architecture = architecture_of(config)
    adapter_names = _adapter_names(gguf_names(architecture, config["num_hidden_layers"]))
    factors = {name: facts for name, facts in artifact.manifest().items() if is_factor(name)}
    check_present(artifact)
    check_supported(architecture, config)
    if architecture.experts:
        raise UserError(
            f"Adapters for the experts of {architecture.classes[0]} are not written. Quantize with --merge."
        )
    entries = [
        file_entry(name, adapter_names[name], facts, _order(config, name, facts["shape"][0]))
        for name, facts in factors.items()
    ]
    check_types(entries, artifact.folder, "Quantize again with --factors F16 or Q8_0.")
    writer = GGUFWriter(None, str(architecture.gguf))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    writer.add_string("lqexport.recipe", json.dumps(public_run(artifact.run()).get("recipe"), sort_keys=True))
    write_content(artifact, path, file_content(writer, entries), on_tensor)


def _adapter_names(model_names: dict[str, str]) -> dict[str, str]:
    """Returns Hugging Face name -> GGUF name for the low-rank factors of all weights of `model_names`."""
    return {
        factor: gguf_name + suffix
        for name, gguf_name in model_names.items()
        if name.endswith(".weight")
        for factor, suffix in zip(factor_names(name), SUFFIXES, strict=True)
    }


def _order(config: dict[str, Any], factor: str, rows: int) -> Order | None:
    return row_order(architecture_of(config), config, corrected_linear(factor), rows) if factor.endswith(B) else None


class GGUFAdapter:
    """The low-rank factors of an adapter file, memory-mapped, with Hugging Face's names and order of rows.

    Raises UserError if the file is missing or damaged, is no LoRA adapter, or does not fit a model of `config`.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self._config = path, config
        metadata, self._tensors = read_header(path)
        if metadata.get("general.type") != "adapter" or metadata.get("adapter.type") != "lora":
            raise UserError(f"{path} is not a LoRA adapter.")
        if metadata.get("adapter.lora.alpha") != 0:
            raise UserError(f"{path} was not written by lqexport: its adapter.lora.alpha is not 0.")
        self._names = self._known_names()

    def _known_names(self) -> dict[str, str]:
        """Returns Hugging Face name -> GGUF name of the file's low-rank factors, in the order of the model."""
        possible = _adapter_names(gguf_names(architecture_of(self._config), self._config["num_hidden_layers"]))
        present = {name: gguf_name for name, gguf_name in possible.items() if gguf_name in self._tensors}
        if unknown := sorted(self._tensors.keys() - present.values()):
            raise UserError(f"{self.path} is for another model: it holds {unknown[0]}.")
        for name in present:
            if not present.keys() >= set(factor_names(corrected_linear(name))):
                raise UserError(f"{self.path} is damaged: {name} is without its other factor.")
        return present

    def names(self) -> list[str]:
        """Returns the names of the low-rank factors, in the order of the model."""
        return list(self._names)

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns codec name, packed planes and shape of a low-rank factor, with its rows in Hugging Face's order.

        Raises UserError if the factor is in an unsupported type or is no matrix.
        """
        tensor = self._tensors[self._names[name]]
        codec_name = f"gguf:{tensor.tensor_type}"
        if codec_name not in names("gguf") or len(tensor.shape) != 2:
            raise UserError(
                f"{self.path}: {name} is of the type {codec_name} {list(tensor.shape)}, which is not supported."
            )
        ((plane, (dtype, stored_shape)),) = codec_named(codec_name).layout(*tensor.shape).items()
        rows = tensor.data.view(dtype).reshape(stored_shape)
        order = _order(self._config, name, len(rows))
        return codec_name, {plane: rows if order is None else rows[order.argsort()]}, tensor.shape
