"""Keeps what the metadata of a .gguf source says: in the artifact, and from there in the exported file.

The artifact holds it as a GGUF file without tensors. Values keep their GGUF types, so numbers keep their bits. What is
true of the source file alone is left out: its types, its parts, and how it was quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import GGUFValueType, GGUFWriter, Keys

from lqexport.converters.gguf.file import write_metadata
from lqexport.converters.gguf.header import TypedValue, read_typed
from lqexport.converters.gguf.metadata import without_type
from lqexport.storage.artifact import SOURCE_METADATA

_NOT_KEPT = (
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "general.quantized_by",
    "general.type",
    "lqexport.",
    "quantize.",
    "split.",
)
"""Keys, or beginnings of keys, that describe the source file and not the model."""


def keep(source: Path, folder: Path) -> None:
    """Writes the metadata of the GGUF file `source` into the model folder of an artifact."""
    typed = read_typed(source)
    writer = GGUFWriter(None, str(typed[Keys.General.ARCHITECTURE].value))
    _add(writer, {key: value for key, value in typed.items() if not key.startswith(_NOT_KEPT)})
    write_metadata(writer, folder / SOURCE_METADATA)


def read_kept(folder: Path) -> dict[str, TypedValue]:
    """Returns the metadata that an artifact's model folder keeps of a .gguf source; {} if the source was none."""
    path = folder / SOURCE_METADATA
    return read_typed(path) if path.is_file() else {}


def kept_name(kept: Mapping[str, TypedValue]) -> str:
    """Returns the model's name as the source gives it, without a type at its end; "" if there is none."""
    return without_type(str(kept[Keys.General.NAME].value)) if Keys.General.NAME in kept else ""


def add_kept(writer: GGUFWriter, kept: Mapping[str, TypedValue]) -> None:
    """Adds to `writer` all kept values whose keys it does not have yet, except those of another architecture."""
    architecture = kept[Keys.General.ARCHITECTURE].value if kept else ""
    foreign = architecture != writer.arch
    _add(
        writer,
        {
            key: typed
            for key, typed in kept.items()
            if key not in writer.kv_data[0] and not (foreign and key.startswith(f"{architecture}."))
        },
    )


def _add(writer: GGUFWriter, values: Mapping[str, TypedValue]) -> None:
    for key, (value, type_code, element_code) in values.items():
        if value != [] and key != Keys.General.ARCHITECTURE:  # gguf-py writes no empty arrays
            element = None if element_code is None else GGUFValueType(element_code)
            writer.add_key_value(key, value, GGUFValueType(type_code), element)
