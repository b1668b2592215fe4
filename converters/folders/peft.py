"""Writes and reads low-rank corrections as a PEFT LoRA folder, for transformers, vLLM and ExLlamaV2.

    adapter_config.json          r, lora_alpha; rank_pattern where linears differ
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [k, C] and .lora_B.weight [R, k], float16 or 32

The scale lora_alpha / r is 1 for every linear, since B holds the scale. The adapter corrects the error of the quantized
model, so it must be loaded onto that model and not onto the source.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from lqexport.converters.factors import A, check_present, corrected_linear, is_factor
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import block_module
from lqexport.converters.models.value_heads import TILED, tiled_columns
from lqexport.errors import UserError
from lqexport.formats.codec import PlainCodec, Planes
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import read_json, write_json, written_whole
from lqexport.storage.tensor_files import open_tensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


def write(artifact: Artifact, folder: Path) -> None:
    """Writes the low-rank corrections of a finished artifact into `folder`.

    Factors in F16 are stored in float16, all others in float32, so no value changes. adapter_config.json is written
    last: where it exists, the folder is whole. Raises UserError if the artifact has no corrections or is damaged, if a
    corrected linear is a part of transformers' linear, or if its columns are in llama.cpp's order.
    """
    check_present(artifact)
    _check_parts(artifact)
    _check_order(artifact)
    tensors, ranks = {}, {}
    for name in filter(is_factor, artifact.manifest()):
        stored = artifact.read(name)
        values = codec_named(stored.codec_name).decode(stored.planes, stored.shape[1])
        tensors[PREFIX + name] = values.astype(np.float16) if stored.codec_name == "gguf:F16" else values
        if name.endswith(A):
            ranks[corrected_linear(name).removesuffix(".weight")] = stored.shape[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    with written_whole(folder / WEIGHTS) as file:
        file.write(safetensors.numpy.save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG, adapter_config(artifact.config(), ranks))


def _check_parts(artifact: Artifact) -> None:
    architecture = architecture_of(artifact.config())
    starts = tuple(f"{fused}." for fused in architecture.parts)
    for linear in map(corrected_linear, filter(is_factor, artifact.manifest())):
        module = block_module(architecture, linear)
        if module is not None and module[1].startswith(starts):
            raise UserError(
                f"{linear} is a part of a linear of transformers, which PEFT would correct as a whole: write the "
                "corrections with `to-gguf --adapter`."
            )


def _check_order(artifact: Artifact) -> None:
    config = artifact.config()
    architecture = architecture_of(config)
    for name, facts in artifact.manifest().items() if config.get(TILED) else ():
        linear = corrected_linear(name) if name.endswith(A) else ""
        if tiled_columns(architecture, config, linear, facts["shape"][-1]) is not None:
            raise UserError(
                f"The correction of {linear} has its columns in llama.cpp's order: write it with `to-gguf --adapter`."
            )


def adapter_config(config: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    """Returns the content of adapter_config.json for a model of `config`.

    ranks   module -> rank of its correction
    """
    (usual, _), *_ = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others, "lora_dropout": 0.0,
        "target_modules": _targets(config, ranks), "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "layers_to_transform": None, "init_lora_weights": True,
    }  # fmt: skip


def _targets(config: dict[str, Any], ranks: dict[str, int]) -> list[str]:
    """Returns `target_modules`: short names such as `q_proj` if every block has the same corrected modules.

    All readers understand the short names. If blocks differ, these are the modules' whole names.
    """
    architecture = architecture_of(config)
    modules = Counter(str(block_module(architecture, f"{name}.weight")[1]) for name in ranks)  # type: ignore[index]
    if all(count == config["num_hidden_layers"] for count in modules.values()):
        return sorted(module.rpartition(".")[2] for module in modules)
    return sorted(ranks)


class PeftAdapter:
    """The low-rank factors of a PEFT folder that `write` wrote.

    Raises UserError if the folder is no such adapter, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        config = read_json(folder / CONFIG, f"{folder} is not a PEFT adapter: it has no {CONFIG}.")
        if (config.get("r"), config.get("rank_pattern")) != (config.get("lora_alpha"), config.get("alpha_pattern")):
            raise UserError(f"{folder} was not written by lqexport: its lora_alpha is not its r.")
        with open_tensors(folder / WEIGHTS, "np", "Copy the adapter again.") as file:
            self._tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        """Returns the names of the low-rank factors."""
        return list(self._tensors)

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Returns codec name, planes and shape of a low-rank factor."""
        values: NDArray[Any] = self._tensors[name]
        codec_name = {"float16": "gguf:F16", "float32": "gguf:F32"}[values.dtype.name]
        codec = codec_named(codec_name)
        assert isinstance(codec, PlainCodec)
        return codec_name, codec.encode_values(values.astype(np.float32)), values.shape
