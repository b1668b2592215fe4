"""The table of the folders of packed safetensors that targets write, by `quant_method` of config.json."""

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
"""`quant_method` of config.json -> the class that reads such a folder."""
