"""The folders of packed safetensors that targets write, told apart by config.json."""

from __future__ import annotations

from pathlib import Path

from lqexport.converters.compressed_tensors import CompressedModel
from lqexport.converters.exl2_read import Exl2Model
from lqexport.converters.folder_model import FolderModel, method_of
from lqexport.converters.gptq import GptqModel

MODELS: dict[str, type[FolderModel]] = {
    "exl2": Exl2Model,
    "gptq": GptqModel,
    "compressed-tensors": CompressedModel,
}
"""By `quant_method`."""


def folder_model(folder: Path) -> FolderModel | None:
    """The model in a folder of one of these; None where it is none. Raises UserError where it is damaged."""
    made = MODELS.get(str(method_of(folder)))
    return made(folder) if made else None
