"""The record of what the program knows about the part of a family's models that reads images.

`families.py` has one entry per family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.models.architecture import Config

Values = NDArray[np.float32]
Take = Callable[[Values, Config], Values]
"""Returns what a GGUF tensor holds of a stored tensor, by the vision part's config. It only moves values."""

NUMBER = re.compile(r"\.(\d{1,4})\.")
"""The number of a block in the name of a tensor. `*` stands for it in tables of names."""
BEFORE = re.compile(r"^(model\.)?(vision_tower\.vision_model\.(?=encoder|embeddings|post_|pre_|head)|)")
"""What some checkpoints have before the names of the tables."""


@dataclass(frozen=True)
class Vision:
    """How the part of a model that reads images is built, named, and described to llama.cpp.

    family       the family's usual name
    classes      class names in `architectures` of config.json
    model_types  `model_type` of its `vision_config`
    projector    llama.cpp's name for how images become inputs of the text part
    projector_key   the GGUF key of that name, without `clip.`
    sizes        GGUF key without `clip.vision.` -> key of `vision_config`
    modules      module -> GGUF module; both have their weights and biases. `*` stands for the number of a block
    tensors      tensor that is no module's weight or bias -> GGUF tensor
    parts        tensor that becomes several -> the GGUF tensors, and what each has of it
    taken        GGUF tensor without its end -> what it has of the stored one, where that is not all in order
    plus_one     GGUF tensors to which 1 is added
    transposed   GGUF matrices that llama.cpp transposes as it runs: they are in F16 where others have blocks
    numbered     module of a list -> key of `vision_config` with the block's number for each entry of the list
    left_out     regular expressions for tensors that llama.cpp has no use for
    activation   key of `vision_config` with the activation of the MLPs
    activations  the activations that llama.cpp computes for the family
    fixed        key of `vision_config` -> the values that llama.cpp computes with; any other value is refused
    whole_fixed  the same of config.json itself
    further      returns further keys without `clip.`, from `vision_config`, config.json and preprocessor_config.json
    break_token  the token whose embedding stands at the end of each row of an image; None where there is none
    checks       returns a sentence on what llama.cpp would compute otherwise, from `vision_config`; "" for nothing
    """

    family: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    projector: str
    sizes: dict[str, str]
    modules: dict[str, str]
    projector_key: str = "projector_type"
    tensors: dict[str, str] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[str, Take], ...]] = field(default_factory=dict)
    taken: dict[str, Take] = field(default_factory=dict)
    plus_one: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    numbered: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    activation: str = "hidden_act"
    activations: tuple[str, ...] = ("gelu_pytorch_tanh",)
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    whole_fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    further: Callable[[Config, Config, Config], dict[str, Any]] = lambda vision, whole, processor: {}
    break_token: str | None = None
    checks: Callable[[Config], str] = lambda vision: ""


def blocks(prefix: str, modules: dict[str, str]) -> dict[str, str]:
    """Returns the entries of `modules` for the modules of a block, with the prefixes of both names before them."""
    return {f"{prefix}.*.{module}": f"v.blk.*.{gguf}" for module, gguf in modules.items()}
