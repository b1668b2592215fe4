"""The types of an MLX target: their names in the dtype of the model, and their settings in config.json.

Scales, biases and all that is not quantized have one dtype, that of the model: mlx computes in the dtype of its
weights. A model in float32 is stored in bfloat16, since float32 scales would take twice the bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lqexport.formats.mlx import HALF_SUFFIX, Affine
from lqexport.formats.mlx_floats import SmallFloats
from lqexport.formats.registry import codec_named, names
from lqexport.storage.files import optional_json

FAMILY = "mlx"
PLAIN = {False: "gguf:BF16", True: "gguf:F16"}
"""Whether a model is in float16 -> the codec of the tensors that are not quantized."""


def types() -> list[str]:
    """Returns the names of the types that a user can ask for."""
    return [name for name in names(FAMILY) if not name.endswith(HALF_SUFFIX)]


def in_half(config: dict[str, Any]) -> bool:
    """Returns whether a model of this config.json is stored in float16; if not, it is in bfloat16."""
    text = config.get("text_config") or {}
    stored = [part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype")]
    return next((dtype for dtype in stored if dtype), "bfloat16") in ("float16", "half")


def in_dtype(name: str, half: bool) -> str:
    """Returns the codec of a type in the dtype of the model.

    name   a type of `types`, or of plain numbers of 16 bits, which become those of the model
    half   whether the model is in float16
    """
    if name in PLAIN.values():
        return PLAIN[half]
    halved = name.removesuffix(HALF_SUFFIX) + HALF_SUFFIX
    return halved if half and halved in names(FAMILY) else name


def settings(codec_name: str) -> dict[str, Any]:
    """Returns the settings of a codec as config.json has them: group_size, bits and mode."""
    codec = codec_named(codec_name)
    assert isinstance(codec, (Affine, SmallFloats))
    mode = codec.mode if isinstance(codec, SmallFloats) else "affine"
    return {"group_size": codec.block, "bits": codec.bits, "mode": mode}


def of_settings(stored: dict[str, Any], half: bool) -> str:
    """Returns the codec name for settings in config.json. Raises ValueError if no codec has them.

    half   whether scales are float16
    """
    wanted = {"mode": "affine"} | stored
    for name in types():
        if settings(name) == wanted:
            return in_dtype(name, half)
    raise ValueError(f"No format of MLX has the settings {stored}.")


def same_groups(codec_name: str) -> tuple[str, ...]:
    """Returns the affine codecs with the groups and the dtype of one, by rising bits."""
    half, groups = codec_name.endswith(HALF_SUFFIX), f"-g{codec_named(codec_name).block}"
    return tuple(in_dtype(name, half) for name in types() if name.endswith(groups))


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Returns `quantization` of a folder's config.json, by which mlx-lm knows its models; None if it has none."""
    quantization = optional_json(folder / "config.json").get("quantization")
    return quantization if isinstance(quantization, dict) else None
