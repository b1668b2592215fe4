"""config.json and two further files of an EXL3 folder that say how it is quantized.

ExLlamaV3 1.6.5 reads neither `quantization_config` nor these files: shapes say all. transformers and tabbyAPI read
`quant_method`. quantization_config.json is what ExLlamaV3's converter writes. GPTQModel 7.7 reads quantize_config.json,
where there is one; it takes the `version` of config.json for the name of a format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lqexport.converters.exl3.support import ExLlamaV3
from lqexport.converters.folders.shards import FolderTensor
from lqexport.converters.models.architecture import Config
from lqexport.converters.models.rope import former_rope
from lqexport.formats.exl3 import MARKERS, WRITTEN_CODEBOOK

VERSION = "1.6.5"
"""The version of ExLlamaV3 that defines the format."""


def exl3_config(rules: ExLlamaV3, config: Config, separate_output: bool, quantization: dict[str, Any]) -> Config:
    """Returns config.json with the keys that ExLlamaV3 reads added to those of transformers.

    separate_output   whether the folder holds an output, so that the model's output is not its embedding
    """
    extended = config | former_rope(config) | {key: config[usual] for key, usual in rules.keys.items()}
    if separate_output and "tie_word_embeddings" in config:
        extended["tie_word_embeddings"] = False
    if "layer_types" in extended:
        extended.pop("sliding_window_pattern", None)  # which ExLlamaV3 reads as a text for some models
    if rules.called:
        extended["architectures"] = [rules.called]
    return extended | {"quantization_config": quantization}


def quantization(run: dict[str, Any], bits: float, head_bits: int) -> dict[str, Any]:
    """Returns `quantization_config` of config.json.

    run         content of the artifact's run.json
    bits        bits of the trellises per weight of the decoder blocks' linears, both padded
    head_bits   bits of the output, or 16
    """
    calibration = run.get("calibration") or {}
    return {
        "quant_method": "exl3",
        "version": VERSION,
        "bits": bits,
        "head_bits": head_bits,
        "calibration": {"rows": calibration.get("samples", 0), "cols": calibration.get("sequence_length", 0)},
        "out_scales": "always",
        "codebook": WRITTEN_CODEBOOK,
    }


def for_gptqmodel(stated: dict[str, Any], storage: dict[str, Any]) -> dict[str, Any]:
    """Returns quantize_config.json, from `quantization_config` of config.json and all of `tensor_storage`."""
    rest = {key: value for key, value in stated.items() if key != "version"}
    head_bits = stated["head_bits"] if stated["head_bits"] <= 8 else None
    modules = {module: entry for module, entry in storage.items() if "quant_format" in entry}
    return rest | {"format": "exl3", "head_bits": head_bits, "tensor_storage": modules}


def tensor_storage(tensors: list[FolderTensor], bits: Mapping[str, float]) -> dict[str, Any]:
    """Returns `tensor_storage` of quantization_config.json: module -> what the folder stores for it.

    bits   module -> K, of the modules that are in EXL3

    The dtype of a tensor is under ExLlamaV3's key and under GPTQModel's.
    """
    modules: dict[str, dict[str, Any]] = {}
    for tensor in tensors:
        for name, (dtype, shape) in tensor.stored.items():
            size = dtype.itemsize
            for count in shape:
                size *= count
            entry = {"shape": list(shape), "n_bytes": size}
            entry |= {"dtype": f"torch.{dtype.name}", "torch_dtype": dtype.name}
            modules.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})["stored_tensors"][name] = entry
    for module, width in bits.items():
        modules[module] |= {"quant_format": "exl3", "bits_per_weight": int(width) if width == int(width) else width}
        modules[module] |= {f"{WRITTEN_CODEBOOK}_multiplier": MARKERS[WRITTEN_CODEBOOK]}
    return modules
