"""The folders of packed safetensors that targets write, told apart by config.json."""

from __future__ import annotations

from lqexport.converters.compressed_tensors import CompressedModel
from lqexport.converters.exl2_read import Exl2Model
from lqexport.converters.folder_model import FolderModel
from lqexport.converters.gptq import GptqModel

MODELS: dict[str, type[FolderModel]] = {
    "exl2": Exl2Model,
    "gptq": GptqModel,
    "compressed-tensors": CompressedModel,
}
"""By `quant_method` of config.json."""
