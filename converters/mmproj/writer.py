"""Writes the image part of a model as a GGUF file for llama.cpp's `--mmproj`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from lqexport.converters.gguf.file import write_headers, write_padded
from lqexport.converters.gguf.header import IMAGE_PART
from lqexport.converters.gguf.metadata import QUANTIZATION_VERSION
from lqexport.converters.gguf.mixes import file_type
from lqexport.converters.mmproj.plan import PictureTensor
from lqexport.converters.mmproj.vision import Values, Vision
from lqexport.converters.models.architecture import Config
from lqexport.errors import UserError
from lqexport.storage.files import check_space, written_whole

USES = {"gelu": "use_gelu", "gelu_pytorch_tanh": "use_gelu", "silu": "use_silu"}
"""Activation -> the key that says so; llama.cpp takes the one that is called quick_gelu without a key."""


def write(
    path: Path,
    tensors: Sequence[PictureTensor],
    keys: dict[str, Any],
    vision: Config,
    read: Callable[[str], Values],
    on_tensor: Callable[[int], None],
) -> None:
    """Writes the file, whole or not at all. Equal inputs give equal bytes.

    keys        the metadata without `clip.`, and keys of `general`
    read        returns a stored tensor's values
    on_tensor   called with the bytes of each tensor that is written

    Raises UserError if the disk is too small, or if a tensor's type cannot hold its values.
    """
    writer = GGUFWriter(None, IMAGE_PART)
    for key, value in keys.items():
        _add(writer, key if key.startswith("general.") else f"{IMAGE_PART}.{key}", value)
    check_space(path, sum(tensor.nbytes for tensor in tensors))
    with written_whole(path) as file:
        write_headers(writer, [file], [list(tensors)])
        for tensor in tensors:
            write_padded(file, tensor.encoded(read(tensor.stored), vision))
            on_tensor(tensor.nbytes)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    add: dict[type, Callable[..., None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    add[type(value)](key, value)


def keys_of(
    family: Vision, vision: Config, whole: Config, processor: Config, type_name: str, name: str
) -> dict[str, Any]:
    """Returns the metadata of the file, without `clip.` but for keys of `general`.

    processor   the content of preprocessor_config.json
    name        the model's name; "" for none

    Raises UserError if a number is missing.
    """
    text = whole.get("text_config") or whole
    keys: dict[str, Any] = {
        "general.type": "mmproj",
        **({"general.name": name} if name else {}),
        "general.file_type": file_type(type_name),
        "general.quantization_version": QUANTIZATION_VERSION,
        family.projector_key: family.projector,
        "has_vision_encoder": True,
        "vision.projection_dim": text.get("hidden_size"),
    }
    keys |= {f"vision.{key}": vision.get(config_key) for key, config_key in family.sizes.items()}
    keys |= {f"vision.{key}": _three(processor, key) for key in ("image_mean", "image_std")}
    if (uses := USES.get(vision[family.activation])) is not None:
        keys[uses] = True
    keys |= family.further(vision, whole, processor)
    if missing := [key for key, value in keys.items() if value is None]:
        raise UserError(f"config.json gives no number for {', '.join(missing)}.")
    return keys


def _three(processor: Config, key: str) -> list[float]:
    values = processor.get(key)
    if not isinstance(values, list) or len(values) != 3 or not np.isfinite(np.array(values, dtype=float)).all():
        raise UserError(f"preprocessor_config.json gives no {key}: it must be beside config.json, with three numbers.")
    return [float(value) for value in values]
