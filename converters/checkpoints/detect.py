"""Finds which tool has quantized a checkpoint, by config.json and the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lqexport.converters.checkpoints.bitsandbytes import BitsAndBytes
from lqexport.converters.checkpoints.compressed_tensors import CompressedTensors
from lqexport.converters.checkpoints.fp4 import Mxfp4
from lqexport.converters.checkpoints.fp8 import Fp8, ModelOpt
from lqexport.converters.checkpoints.gptq import Awq, Gptq
from lqexport.converters.checkpoints.layout import CheckpointLayout, StoredByName
from lqexport.converters.checkpoints.leanquant import LeanQuant
from lqexport.converters.checkpoints.mlx import Mlx
from lqexport.errors import UserError
from lqexport.storage.files import read_json

LAYOUTS: dict[str, type[CheckpointLayout]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
    "modelopt": ModelOpt,
    "mxfp4": Mxfp4,
    "bitsandbytes": BitsAndBytes,
    "mlx": Mlx,
}
"""`quant_method` of config.json -> layout. LeanQuant is not among them: its checkpoints come without a config.json."""


def layout_of(
    folder: Path, config: dict[str, Any], names: Collection[str], stored: StoredByName
) -> CheckpointLayout | None:
    """Returns the layout of a folder's quantized tensors; None where the folder is not quantized.

    names    names of the folder's tensors
    stored   the tensors themselves

    Raises UserError if the folder is quantized in a way that is not read; the message names those that are.
    """
    if any(name.endswith(f".{LeanQuant.mark}") for name in names):
        return LeanQuant(stored, names, {})
    quantization = _mlx_config(config) or config.get("quantization_config")
    quantization = quantization or _gptq_config(folder) or _modelopt_config(folder)
    if not quantization:
        return None
    method = str(quantization.get("quant_method"))
    if method not in LAYOUTS:
        known = ", ".join([*LAYOUTS, "LeanQuant's tables"])
        raise UserError(f"{folder} is quantized by {method}, which is not read as a source. Known: {known}.")
    return LAYOUTS[method](stored, names, quantization)


def _mlx_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the settings that mlx-lm writes into config.json; None if there are none.

    It writes them a second time, as `quantization_config`, without a method.
    """
    quantization = config.get("quantization")
    return {"quant_method": "mlx"} | quantization if isinstance(quantization, dict) else None


def _gptq_config(folder: Path) -> dict[str, Any] | None:
    """Returns the content of quantize_config.json, which old versions of AutoGPTQ write; None if there is none."""
    path = folder / "quantize_config.json"
    return {"quant_method": "gptq"} | read_json(path, "") if path.is_file() else None


def _modelopt_config(folder: Path) -> dict[str, Any] | None:
    """Returns the settings in hf_quant_config.json, which ModelOpt writes; None if there is none."""
    path = folder / "hf_quant_config.json"
    return {"quant_method": "modelopt"} | read_json(path, "")["quantization"] if path.is_file() else None
