"""The mixes of every architecture (Q4_K_M and others) give each tensor the type that llama.cpp gives it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from family_cases import CASES, make_tokenizer
from llama_mixes import types_by_llamacpp
from transformers import AutoModelForCausalLM

from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.mixes import MIXES
from lqexport.converters.models.architecture import BORROWED
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.converters.targets import plan
from lqexport.formats.registry import codec_named
from lqexport.models.modules import expected_shapes
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.target import Target

KEPT = {"deepseek4": ("hc_attn_fn", "hc_ffn_fn", "output_hc_fn", "attn_compressor_ape", "indexer_compressor_ape")}
"""llama.cpp's name of an architecture -> tensors that are F32 here, and that its quantizer rounds as linears."""


class Zeros(Artifact):
    """A finished F16 artifact without files: its tensors are all zero."""

    def __init__(self, folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(folder)
        self._config, self._planned = config, plan(Target.parse("gguf:F16"), config, shapes)

    def config(self) -> dict[str, Any]:
        return self._config

    def run(self) -> dict[str, Any]:
        return {}

    def manifest(self) -> dict[str, dict[str, Any]]:
        return {t.name: {"codec": t.codec_name, "shape": list(t.shape), "sha256": ""} for t in self._planned}

    def read_listed(self, name: str, codec_name: str, shape: tuple[int, ...], sha256: str) -> StoredTensor:
        matrix = shape if len(shape) == 2 else (1, shape[0])
        planes = {key: np.zeros(form, dtype) for key, (dtype, form) in codec_named(codec_name).layout(*matrix).items()}
        return StoredTensor(name, codec_name, shape, planes)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Zeros]]:
    """A function that makes F16.gguf and the artifact of a case's model, with 17 blocks of 256 columns for K-quants."""

    @functools.cache
    def make(name: str, **more: Any) -> tuple[Path, Zeros]:
        config_class, options, _ = CASES[name]
        of_blocks = {
            key: (value * 17)[:17]
            for key, value in options.items()
            if isinstance(value, list) and len(value) == options["num_hidden_layers"] and key != "mrope_section"
        }
        of_blocks.pop("activation_sparsity_pattern", None)  # the usual one is the default
        left_out = ("rope_parameters", "activation_sparsity_pattern")
        kept = {key: value for key, value in options.items() if key not in left_out} | of_blocks
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 17, "moe_intermediate_size": 256}
        sizes |= {"n_embd": 256, "n_layer": 17, "num_local_experts": 8} | more
        # MiMo rotates 0.334 of a head, which must be an even number of columns.
        sizes |= {"head_dim": 96 if name == "mimo2" else 64, "query_pre_attn_scalar": 64}
        sizes |= {} if "linear_num_key_heads" in options else {"mrope_section": [16, 8, 8]}  # others rotate a quarter
        if options.get("num_local_experts") == 0:
            del sizes["num_local_experts"]
        if options.get("q_lora_rank", 0) is None:
            del sizes["num_hidden_layers"]
        hf = getattr(transformers, config_class)(**{key: sizes.get(key, value) for key, value in kept.items()})
        classes = {"architectures": [AutoModelForCausalLM._model_mapping[type(hf)].__name__]}
        config = json.loads(hf.to_json_string(use_diff=False)) | classes
        artifact = Zeros(tmp_path_factory.mktemp("wide"), config, expected_shapes(config))
        make_tokenizer("gpt-2", artifact.folder).save_pretrained(artifact.model_folder)
        return gguf_writer.write(artifact, artifact.folder / "F16.gguf")[0], artifact

    return make


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", CASES)
def test_mixes_are_llamacpps(wide: Callable[..., tuple[Path, Zeros]], name: str) -> None:
    for mix in MIXES:
        check_mix(*wide(name), mix)


@pytest.mark.llamacpp
@pytest.mark.parametrize("mix", ["Q4_K_S", "IQ3_M", "IQ2_M"])
def test_mix_of_qwen2_with_80_blocks_is_llamacpps(wide: Callable[..., tuple[Path, Zeros]], mix: str) -> None:
    """llama.cpp treats it as a 70B model even if each query head has its own key head, as in Qwen1.5 72B."""
    check_mix(*wide("qwen2", num_hidden_layers=80, num_key_value_heads=4), mix)


@pytest.mark.llamacpp
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q3_K_L"])
def test_mix_of_gemma_3n_whose_blocks_share_keys_is_llamacpps(
    wide: Callable[..., tuple[Path, Zeros]], mix: str
) -> None:
    """llama.cpp counts the values of all blocks, also those that it does not compute with."""
    lists = {"layer_types": None, "activation_sparsity_pattern": None}
    check_mix(*wide("gemma3n", num_hidden_layers=26, num_kv_shared_layers=6, **lists), mix)


def check_mix(source: Path, artifact: Zeros, mix: str) -> None:
    shapes = {key: tuple(facts["shape"]) for key, facts in artifact.manifest().items()}
    planned = plan(Target.parse(f"gguf:{mix}"), artifact.config(), shapes)
    config = normalized(artifact.config())
    architecture = architecture_of(config)
    renamed = gguf_names(architecture, config["num_hidden_layers"])
    planned = [tensor for tensor in planned if not tensor.name.endswith(tuple(architecture.numbers))]
    theirs = types_by_llamacpp(source, mix)
    theirs.pop("rope_freqs.weight", None)  # the writer makes it from the config
    borrowed = tuple(f"{architecture.gguf_block.get(module)}.weight" for module in BORROWED)
    theirs = {name: form for name, form in theirs.items() if name in renamed.values() or not name.endswith(borrowed)}
    kept = {name for name in theirs if name.removesuffix(".weight").endswith(KEPT.get(str(architecture.gguf), ()))}
    assert "F32" not in {theirs[name] for name in kept}
    theirs |= dict.fromkeys(kept, "F32")
    assert {renamed[tensor.name]: tensor.codec_name.partition(":")[2] for tensor in planned} == theirs
