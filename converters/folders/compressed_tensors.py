"""Writes an artifact of GPTQ's layout as a compressed-tensors folder, and reads such a folder.

vLLM and transformers load the folder. The format is pack-quantized. For N rows, K columns and G groups, a linear X is
stored as

    X.weight_packed      int32 [N, K / 8]    codes; bits 4j..4j+3 of word w hold column 8w + j
    X.weight_scale       float16 [N, G]
    X.weight_zero_point  int32 [N / 8, G]    zero points; bits 4j..4j+3 of word w hold row 8w + j; absent if symmetric
    X.weight_shape       int64 [2]           N, K

The decoded values are those of GPTQ's layout. Groups must be consecutive columns, since compressed-tensors no longer
supports others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.folders.gptq import HINT, ONES, codec_of_model, half_precision
from lqexport.converters.folders.packed import FolderLayout, Forms, OnTensor, entries_of, write_folder
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.gptq import BITS, GPTQ, Gptq
from lqexport.formats.native import pack_bits, unpack_bits
from lqexport.storage.artifact import Artifact, StoredTensor

FOLDER = "a compressed-tensors folder"


def write(artifact: Artifact, folder: Path, on_tensor: OnTensor = None) -> None:
    """Writes a finished artifact as the new folder `folder` (see `packed.write_folder`).

    Raises UserError if the artifact is unfinished, damaged, not in GPTQ's layout, or in act-order, if the folder
    exists, or if the disk is too small.
    """
    entries = entries_of(artifact, "gptq", FOLDER, HINT)
    codec = codec_of_model(artifact)
    if codec.reorders:
        raise UserError(
            f"{artifact.folder} cannot become {FOLDER}: compressed-tensors has no groups in act-order any more. "
            f"Quantize again with the target {codec.name.removesuffix('-act')}, or take to-gptq."
        )
    config = half_precision(artifact.config()) | {"quantization_config": quantization(codec)}
    layout = FolderLayout(_forms, _planes)
    write_folder(artifact, folder, entries, layout, {"config.json": config}, on_tensor)


def quantization(codec: Gptq) -> dict[str, Any]:
    """Returns quantization_config of config.json for a model whose linears are all in one codec."""
    size = {"strategy": "group", "group_size": codec.group} if codec.group else {"strategy": "channel"}
    weights = {"num_bits": BITS, "type": "int", "symmetric": codec.symmetric, "dynamic": False, **size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def _forms(codec_name: str, shape: tuple[int, ...]) -> Forms:
    codec, (rows, columns) = GPTQ[codec_name], shape
    groups = codec.scale.groups(columns)
    forms: Forms = {
        "weight_packed": (np.dtype(np.int32), (rows, columns // 8)),
        "weight_scale": (np.dtype(np.float16), (rows, groups)),
        "weight_shape": (np.dtype(np.int64), (2,)),
    }
    zeros = {} if codec.symmetric else {"weight_zero_point": (np.dtype(np.int32), (rows // 8, groups))}
    return forms | zeros


def _planes(tensor: StoredTensor) -> Planes:
    columns = tensor.shape[1]
    codes = unpack_bits(np.ascontiguousarray(tensor.planes["qweight"].T).view(np.uint8), BITS, columns)
    return {
        "weight_packed": pack_bits(codes, BITS).view(np.int32),
        "weight_scale": tensor.planes["scales"].T,
        "weight_shape": np.array(tensor.shape, np.int64),
        "weight_zero_point": (tensor.planes["qzeros"] + ONES).T,
    }


class CompressedModel(FolderModel):
    """A model in a pack-quantized folder. Its codec follows from quantization_config."""

    container, reader = "compressed-tensors folder", "vLLM"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")

    def packed_shape(self, key: str) -> tuple[int, int]:
        rows, words = self.stored.shape(f"{key}.weight_packed")
        return rows, 8 * words

    def packed_codec(self, key: str) -> str:
        stored = self.config["quantization_config"]
        for codec in GPTQ.values():
            if not codec.reorders and _same_weights(stored, quantization(codec)):
                return codec.name
        raise ValueError(f"Known are {BITS} bits in groups of 32, 64, 128 or a whole row, not {stored}.")

    def packed_planes(self, key: str) -> Planes:
        codec, (rows, columns) = GPTQ[self.packed_codec(key)], self.packed_shape(key)
        codes = unpack_bits(self.stored[f"{key}.weight_packed"].view(np.uint8), BITS, columns)
        scales = np.ascontiguousarray(self.stored[f"{key}.weight_scale"].T)
        if codec.symmetric:
            zeros = np.full((len(scales), rows // 8), 7 * ONES)
        else:
            zeros = np.ascontiguousarray(self.stored[f"{key}.weight_zero_point"].T) - ONES
        return {
            "qweight": np.ascontiguousarray(pack_bits(codes, BITS).view(np.int32).T),
            "qzeros": zeros,
            "scales": scales,
            "g_idx": np.arange(columns, dtype=np.int32) // (codec.group or columns),
        }


def _same_weights(stored: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Returns whether a stored quantization_config has all settings of weights that the `wanted` one has."""
    groups = list((stored.get("config_groups") or {}).values())
    weights = wanted["config_groups"]["group_0"]["weights"]
    return (
        stored.get("format") == "pack-quantized"
        and len(groups) == 1
        and all(groups[0].get("weights", {}).get(key) == value for key, value in weights.items())
    )
