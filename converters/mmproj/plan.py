"""Plans the file of a model's image part: its tensors, their types, and where their values come from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from lqexport.converters.mmproj.families import FAMILIES, REFUSED
from lqexport.converters.mmproj.vision import BEFORE, NUMBER, Take, Values, Vision
from lqexport.converters.models.architecture import Config
from lqexport.converters.models.hf_defaults import options_of
from lqexport.errors import UserError, listed

TYPES = ("F16", "BF16", "F32", "Q8_0")
"""The types that the matrices of the file may have."""
ENDS = ("weight", "bias", "input_min", "input_max", "output_min", "output_max")
EXACT = ("v.patch_embd.", "v.position_embd.")
"""The beginnings of names of tensors that stay in float32: convolutions and positions, which are few."""


@dataclass(frozen=True)
class PictureTensor:
    """One tensor of the file.

    name     its GGUF name
    stored   the tensor of the checkpoint that it comes from
    shape    its shape, rows first
    type     its GGUF type
    plus     the number that is added to its values
    take     what it has of the stored tensor
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    type: str
    plus: float
    take: Take

    @property
    def codec_name(self) -> str:
        return f"gguf:{self.type}"

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // block * block_bytes

    def encoded(self, values: Values, vision: Config) -> np.ndarray[Any, Any]:
        """Returns the tensor's bytes from the stored tensor's values. Raises UserError if the type cannot hold them."""
        wanted = np.ascontiguousarray(np.atleast_1d(self.take(values, vision))) + np.float32(self.plus)
        with np.errstate(over="ignore"):
            if not np.isfinite(wanted.astype(np.float16) if self.type == "F16" else wanted).all():
                raise UserError(f"{self.stored} holds values that {self.type} cannot: take another --type.")
        encoded: np.ndarray[Any, Any] = quantize(wanted, GGMLQuantizationType[self.type])
        return encoded


def vision_of(config: Config) -> tuple[Vision, Config, Config]:
    """Returns the family of a model's image part, and its `vision_config` and config.json with transformers' defaults.

    Raises UserError if the model has no such part, or one that is not written.
    """
    names = config.get("architectures") or []
    given = config.get("vision_config")
    if not isinstance(given, dict):
        raise UserError(f"{', '.join(map(str, names)) or 'The model'} has no part that reads images (vision_config).")
    whole = _complete(config)
    vision: Config = whole["vision_config"]
    for family in FAMILIES:
        if any(name in family.classes for name in names) and vision.get("model_type") in family.model_types:
            _check(family, vision, whole)
            return family, vision, whole
    if why := REFUSED.get(str(vision.get("model_type"))):
        raise UserError(f"The image part of {', '.join(map(str, names))} is not written: {why}.")
    known = ", ".join(family.family for family in FAMILIES)
    raise UserError(
        f"The image part of {', '.join(map(str, names))} ({vision.get('model_type')}) is not written. Known: {known}."
    )


def _complete(config: Config) -> Config:
    """Returns config.json with the values that transformers takes for keys that it leaves out."""
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"transformers knows no model_type {model_type!r} of config.json.")
    options = {key: value for key, value in options_of(config).items() if key != "model_type"}
    try:
        complete: Config = CONFIG_MAPPING[model_type](**options).to_dict()
    except Exception as error:  # each class raises exceptions of its own
        raise UserError(f"transformers can make no model of config.json ({type(error).__name__}: {error}).") from error
    return complete


def _check(family: Vision, vision: Config, whole: Config) -> None:
    """Raises UserError if llama.cpp would compute something else than config.json asks for."""
    fixed = {key: (vision.get(key), allowed) for key, allowed in family.fixed.items()}
    fixed |= {key: (whole.get(key), allowed) for key, allowed in family.whole_fixed.items()}
    fixed[family.activation] = (vision.get(family.activation), family.activations)
    for key, (value, allowed) in fixed.items():
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UserError(f"llama.cpp computes images of {family.family} with {key} {wanted}, and it is {value!r}.")
    if difference := family.checks(vision):
        raise UserError(f"{family.family}: {difference}.")


def plan_pictures(
    family: Vision, vision: Config, shapes: Mapping[str, tuple[int, ...]], type_name: str
) -> list[PictureTensor]:
    """Returns the tensors of the file, in the order of its blocks.

    shapes      name -> shape of the checkpoint's tensors beside those of the text part
    type_name   one of TYPES, for matrices; other tensors are in F32

    Raises UserError if a tensor is missing or has no place in the file.
    """
    tensors, unknown = [], []
    for stored, shape in shapes.items():
        name = BEFORE.sub("", stored, count=1)
        if any(re.search(pattern, name) for pattern in family.left_out):
            continue
        places = [*_places(family, vision, name)]
        unknown += [] if places else [stored]
        for gguf_name, take in places:
            taken = np.atleast_1d(take(np.broadcast_to(np.float32(0), shape), vision)).shape
            plus = float(gguf_name in family.plus_one)
            type_ = _type(family, gguf_name, taken, type_name)
            tensors.append(PictureTensor(gguf_name, stored, taken, type_, plus, take))
    if unknown:
        raise UserError(f"The image part of {family.family} has no tensor {listed(unknown)}.")
    _check_complete(family, vision, {tensor.name for tensor in tensors})
    return sorted(tensors, key=lambda tensor: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", tensor.name)])


def _places(family: Vision, vision: Config, name: str) -> list[tuple[str, Take]]:
    """Returns the GGUF tensors that hold a stored tensor, and what each has of it; [] if there is none."""
    number = match[1] if (match := NUMBER.search(name)) else ""
    pattern = NUMBER.sub(".*.", name, count=1)
    module, _, end = pattern.rpartition(".")
    if pattern not in family.modules and name.rpartition(".")[0] in family.modules:
        module = name.rpartition(".")[0]  # a number that is not a block's: `merger.mlp.0`
    for start, key in family.numbered.items():
        if name.startswith(f"{start}."):
            number = str((vision.get(key) or [])[int(number)])
    if name in family.tensors:
        return [(family.tensors[name], _whole)]
    places: tuple[tuple[str, Take], ...] = family.parts.get(pattern, ())
    if not places and module in family.modules and end in ENDS:
        gguf = family.modules[module]
        places = ((f"{gguf}.{end}", family.taken.get(gguf, _whole)),)
    return [(gguf.replace("*", number), take) for gguf, take in places]


def _whole(values: Values, vision: Config) -> Values:
    return values


def _type(family: Vision, name: str, shape: tuple[int, ...], type_name: str) -> str:
    if len(shape) < 2 or name.startswith(EXACT):
        return "F32"
    if type_name in ("F16", "F32"):
        return type_name
    return "F16" if name in family.transposed or (type_name == "Q8_0" and shape[-1] % 32) else type_name


def _check_complete(family: Vision, vision: Config, names: set[str]) -> None:
    """Raises UserError if the file would lack weights that llama.cpp needs."""
    count, needed = int(vision[family.sizes["block_count"]]), set[str]()
    of_modules = {module: f"{gguf}.weight" for module, gguf in family.modules.items()}
    of_parts = {pattern: gguf for pattern, places in family.parts.items() for gguf, _ in places}
    for pattern, gguf in (of_modules | of_parts).items():
        listed_by = [key for start, key in family.numbered.items() if pattern.startswith(f"{start}.")]
        numbers = (vision.get(listed_by[0]) or []) if listed_by else range(count)
        needed |= {gguf.replace("*", str(number)) for number in numbers} if "*" in gguf else {gguf}
    if missing := sorted(needed - names):
        raise UserError(f"The image part of {family.family} lacks what becomes {listed(missing)}.")
