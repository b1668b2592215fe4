"""`to-mmproj`: the part of a model that reads images, as a file for llama.cpp's `--mmproj`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.gguf.metadata import model_name, without_type
from lqexport.converters.mmproj.plan import TYPES, PictureTensor, plan_pictures, vision_of
from lqexport.converters.mmproj.vision import Vision
from lqexport.converters.mmproj.writer import keys_of, write
from lqexport.converters.models.architecture import Config
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError, files_at_hand, listed, well_formed
from lqexport.models.inspect import Inspection, TensorInfo
from lqexport.models.source import PROCESSOR_FILES, HuggingFaceSource, open_source
from lqexport.runtime.progress import Listener, Silent
from lqexport.runtime.shown import Shown
from lqexport.storage.config_check import read_config
from lqexport.storage.files import read_json

BREAK = "v.token_embd.img_break"
"""The GGUF name of the embedding at the end of each row of an image."""
FLOATS = ("F16", "BF16", "F32", "F64")
"""The dtypes, by safetensors' name, in which an image part is read."""


@dataclass(frozen=True, repr=False)
class Pictures(Shown):
    """The file of a model's image part, before it is written.

    source     the model
    family     what is known of its image part
    vision     its `vision_config`, with transformers' defaults
    tensors    every tensor of the file
    keys       the metadata, as `mmproj.writer.write` takes it
    """

    source: HuggingFaceSource
    family: Vision
    vision: Config
    tensors: list[PictureTensor]
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def inspection(self) -> Inspection:
        """The tensors, as `inspect` lists them."""
        entries = [TensorInfo(each.name, each.shape, each.codec_name, each.nbytes) for each in self.tensors]
        return Inspection(self.source.name, f"image part of {self.family.family}", entries)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values, for `--json`."""
        tensors = [asdict(entry) for entry in self.inspection.entries]
        return {"family": self.family.family, "projector": self.family.projector, "metadata": self.keys} | {
            "nbytes": sum(tensor.nbytes for tensor in self.tensors), "tensors": tensors
        }  # fmt: skip

    def read(self, stored: str) -> NDArray[np.float32]:
        """Returns a tensor of the checkpoint by the name that `PictureTensor` gives, in float32."""
        is_embedding = stored == architecture_of(self.source.config).embedding
        tensor = self.source.read(stored) if is_embedding else self.source.stored_tensor(stored)
        values: NDArray[np.float32] = tensor.float().numpy()
        return values


@files_at_hand()
def plan_mmproj(source: str | Path, type_name: str = "F16") -> Pictures:
    """Returns what `to_mmproj` would write; reads no weights.

    Raises UserError if the source has no image part, or one that is not written, if a tensor is missing, unknown or
    quantized, if a setting is one that llama.cpp does not compute with, or if preprocessor_config.json is missing.
    """
    if type_name not in TYPES:
        raise UserError(f"An image part has no type {type_name}: choose one of {', '.join(TYPES)}.")
    opened = open_source(str(source))
    if not isinstance(opened, HuggingFaceSource):
        raise UserError(f"{source} holds the text part alone: give the folder or hub id of the whole model.")
    config = read_config(opened.folder / "config.json", f"{opened.folder} has no config.json.")
    with well_formed(f"{opened.folder / 'config.json'}"):
        return _planned(opened, config, type_name)


def _planned(opened: HuggingFaceSource, config: Config, type_name: str) -> Pictures:
    family, vision, whole = vision_of(config)
    shapes = {name: opened.stored_shape(name) for name in opened.others()}
    if packed := [name for name in shapes if opened.stored_form(name)[0] not in FLOATS]:
        raise UserError(f"The image part is quantized, and is read in floating point alone: {listed(packed)}.")
    tensors = plan_pictures(family, vision, shapes, type_name)
    if family.break_token:
        tensors.append(_break(opened, family.break_token))
    name = without_type(model_name({"recipe": {"source": opened.name}}))
    return Pictures(
        opened, family, vision, tensors, keys_of(family, vision, whole, _processor(opened), type_name, name)
    )


@files_at_hand()
def to_mmproj(
    source: str | Path, path: str | Path, *, type_name: str = "F16", listener: Listener | None = None
) -> Pictures:
    """Writes the image part of a model as a GGUF file for llama.cpp's `--mmproj`, whole or not at all.

    source      a folder or hub id of a model with images
    type_name   the type of its matrices: F16, BF16, F32 or Q8_0

    Returns what it wrote. Raises UserError as `plan_mmproj`, if the disk is too small, or if the type cannot hold a
    value.
    """
    planned, listener = plan_mmproj(source, type_name), listener or Silent()
    listener.stage("Write the image part", sum(tensor.nbytes for tensor in planned.tensors))
    write(Path(path), planned.tensors, planned.keys, planned.vision, planned.read, listener.advance)
    return planned


def _processor(source: HuggingFaceSource) -> Config:
    """Returns the settings of the image processor; {} if there are none. Some models have them in a larger file."""
    settings: Config = {}
    for name in PROCESSOR_FILES:
        path = source.folder / name
        if path.is_file():
            content = read_json(path, f"{path} is gone.")
            settings |= content | (content.get("image_processor") or {})
    return settings


def _break(source: HuggingFaceSource, token: str) -> PictureTensor:
    """Returns the embedding of the token that ends each row of an image. Raises UserError if there is no such token."""
    name, tokenizer = architecture_of(source.config).embedding, source.tokenizer()
    number = tokenizer.get_vocab().get(token)
    rows, columns = source.shape(name)
    if number is None or number >= rows:
        raise UserError(f"The tokenizer of {source.folder} has no token {token}, which ends each row of an image.")
    return PictureTensor(BREAK, name, (columns,), "F32", 0.0, lambda values, vision: values[number])
