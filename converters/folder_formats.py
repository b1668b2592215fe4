"""The folders of packed safetensors that targets write, told apart by config.json."""

from __future__ import annotations

from lqexport.converters.exl2.reader import Exl2Model
from lqexport.converters.folders.compressed_tensors import CompressedModel
from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.folders.gptq import GptqModel

MODELS: dict[str, type[FolderModel]] = {
    "exl2": Exl2Model,
    "gptq": GptqModel,
    "compressed-tensors": CompressedModel,
}
"""By `quant_method` of config.json."""
