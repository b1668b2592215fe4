"""Keys that config.json leaves out have transformers' defaults, in the metadata of GGUF files and in the logits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from config_variations import completed, configs_without_a_key, lacking_one_key
from family_cases import BECOME_OTHERS, CASES, SIZES, export, make_model, make_tokenizer
from family_cases import pieces as pieces
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, PreTrainedModel

from lqexport.converters.gguf.config import Metadata, config_of
from lqexport.converters.gguf.metadata import add_model
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.hf_defaults import options_of
from lqexport.converters.models.rope import rope_factors
from lqexport.converters.models.tensor_names import is_tied
from lqexport.converters.models.windows import layer_types
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.modules import meta_model
from lqexport.planning.cost import operations_estimate
from lqexport.planning.forecast import forecast
from lqexport.recipe import Recipe

Config = dict[str, Any]
Outcome = tuple[Any, ...]

TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 40))]
PATTERN = "attention.sliding_window_pattern"


def outcome(config: Config) -> Outcome:
    """Returns what a GGUF file of a model says about config.json: metadata, and the tensors that follow from it."""
    config = normalized(copy.deepcopy(config))
    architecture = architecture_of(config)
    writer = GGUFWriter(None, str(architecture.gguf))
    add_model(writer, architecture, config, 512)
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    metadata = {key: float(np.float32(value)) if isinstance(value, float) else value for key, value in metadata.items()}
    factors = {name: values.tolist() for name, values in rope_factors(config).items()}
    return architecture.family, is_tied(config), metadata, factors


def outcome_or_refusal(config: Config) -> Outcome:
    try:
        family, tied, metadata, factors = outcome(config)
    except UserError as error:
        return ("refused", str(error))
    name = next((key for key in metadata if key.endswith(PATTERN)), None)
    pattern = metadata[name] if name else None
    if isinstance(pattern, int):
        pattern = layer_types(pattern, config.get("num_hidden_layers", 3))
    return family, tied, {key: value for key, value in metadata.items() if key != name}, pattern, factors


@pytest.mark.parametrize("name", CASES)
def test_metadata_without_a_key_are_those_with_transformers_default(name: str) -> None:
    checked, expected = 0, dict[str, Outcome]()  # many keys have the default, so that many complete ones are alike
    for key, lacking, complete in configs_without_a_key(name):
        checked += 1
        content = json.dumps(complete, sort_keys=True)
        if content not in expected:
            expected[content] = outcome_or_refusal(complete)
        assert outcome_or_refusal(lacking) == expected[content], key
    assert checked > 20


WIDTHS = {"hidden_size", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "num_hidden_layers"}
WIDTHS |= {"n_embd", "n_head", "n_layer", "intermediate_size", "moe_intermediate_size", "num_experts"}
WIDTHS |= {"moe_num_experts", "num_local_experts", "n_routed_experts"}
"""Keys whose defaults are those of a large model."""
MOST_WEIGHTS = 1_000_000


@torch.no_grad()
def random_logits(config: Config, state: dict[str, torch.Tensor] | None = None) -> tuple[PreTrainedModel, torch.Tensor]:
    """Returns transformers' model of config.json and its logits; its weights are `state`, or else random."""
    torch.manual_seed(0)
    options = {key: value for key, value in options_of(config).items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[config["model_type"]](**options)).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    if state is not None:
        model.load_state_dict(state)
    return model, model(torch.tensor([TOKENS]), use_cache=False).logits


def changed(config: Config) -> dict[str, tuple[Config, Outcome]]:
    """Returns key -> (config.json without it, outcome) for every key whose lack changes a small model's metadata."""
    seen, changes = [outcome(config)], {}
    for key, lacking in lacking_one_key(config):
        try:
            result = outcome(lacking) if key not in WIDTHS else seen[0]
            if result in seen or sum(map(torch.numel, meta_model(copy.deepcopy(lacking)).parameters())) > MOST_WEIGHTS:
                continue
        except UserError:
            continue
        seen.append(result)
        changes[key] = lacking, result
    return changes


def in_file(config: Config, result: Outcome, names: set[str]) -> Config:
    """Returns the config.json that is rebuilt from the metadata in an outcome.

    names   the names of the model's tensors
    """
    architecture = architecture_of(config)
    factors = {tensor: np.array(values, np.float32) for tensor, values in result[3].items()}
    present = names - ({architecture.output} if result[1] else set())
    return config_of(Metadata("file", architecture, result[2]), 512, present, factors)


@pytest.mark.parametrize("name", [name for name in CASES if name not in BECOME_OTHERS])
def test_config_in_a_file_gives_the_same_file(name: str) -> None:
    """No default is added to a rebuilt config.json that changes what it says."""
    class_name, options, _ = CASES[name]
    config = completed(class_name, options)
    expected = outcome(config)
    rebuilt = in_file(config, expected, set(meta_model(copy.deepcopy(config)).state_dict()))
    result = outcome(rebuilt)
    assert result[1:3] == expected[1:3]
    for tensor, values in expected[3].items():
        assert np.allclose(result[3][tensor], values, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name not in BECOME_OTHERS])
def test_logits_without_a_key_are_those_of_the_config_in_the_file(name: str) -> None:
    class_name, options, _ = CASES[name]
    for key, (lacking, result) in changed(completed(class_name, options)).items():
        try:
            model, expected = random_logits(lacking)
        except (RuntimeError, ValueError):  # such as heads that key heads do not divide
            continue
        rebuilt = in_file(lacking, result, set(model.state_dict()))
        assert torch.allclose(random_logits(rebuilt, model.state_dict())[1], expected, atol=1e-4), key


GROUPS_OF_TWO = {"n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 2}
WITHOUT_DEFAULTS = [
    ("gemma2", {"sliding_window": 16}, ["query_pre_attn_scalar", "head_dim"]),
    ("gptneox", {"hidden_size": 128}, ["rope_parameters"]),
    ("mixtral", {}, ["rope_parameters"]),
    ("smollm3", {"num_hidden_layers": 4}, ["rope_parameters", "no_rope_layers"]),
    ("deepseek-v3", GROUPS_OF_TWO, ["n_group", "topk_group", "routed_scaling_factor"]),
    ("qwen3moe", {"rope_parameters": None}, ["head_dim", "rope_parameters"]),
]


@pytest.mark.llamacpp
@pytest.mark.parametrize(("name", "changes", "left_out"), WITHOUT_DEFAULTS)
def test_llamacpp_computes_with_transformers_defaults(
    name: str, changes: Config, left_out: list[str], tmp_path: Path, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_name, options, tokenizer = CASES[name]
    options = {key: value for key, value in (options | changes).items() if key not in left_out}
    monkeypatch.setitem(CASES, name, (class_name, options, tokenizer))
    model = make_model(name)
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer(tokenizer, pieces).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert all(key in config for key in left_out if key != "head_dim" or name == "gemma2")
    lacking = {key: value for key, value in config.items() if key not in left_out}
    (tmp_path / "hf/config.json").write_text(json.dumps(lacking))
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    with LlamaCpp(path, 64, threads=1) as engine:
        assert np.abs(engine.logits(TOKENS) - expected).mean() < 0.003


def test_mistral_without_a_window_in_its_config_has_transformers_window() -> None:
    config = completed("MistralConfig", SIZES | {"max_position_embeddings": 8192})
    lacking = {key: value for key, value in config.items() if key != "sliding_window"}
    assert outcome(lacking)[2]["llama.context_length"] == 4096
    assert outcome(config | {"sliding_window": None})[2]["llama.context_length"] == 8192


def test_gemma_3_files_of_llamacpps_converter_leave_out_the_base_within_windows() -> None:
    config = completed(*CASES["gemma3"][:2])
    result = outcome(config)
    assert result[2].pop("gemma3.rope.freq_base_swa") == 1e4
    rebuilt = in_file(config, result, set())
    assert rebuilt["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4


def test_deepseek_without_a_rank_of_queries_has_transformers_rank() -> None:
    """Not plain queries, which `q_lora_rank: null` stands for."""
    config = completed("DeepseekV3Config", CASES["deepseek-v3"][1])
    lacking = {key: value for key, value in config.items() if key != "q_lora_rank"}
    assert outcome(lacking)[2]["deepseek2.attention.q_lora_rank"] == 1536
    assert "plain queries" in architecture_of(config | {"q_lora_rank": None}).family


def test_a_config_that_has_its_keys_stays_as_it_is() -> None:
    for name, (class_name, options, _) in CASES.items():
        config = normalized(completed(class_name, options))
        if name in BECOME_OTHERS:  # a config of another family, which has further keys
            config = normalized(config)
        assert normalized(copy.deepcopy(config)) == config


def test_forecast_of_a_config_under_the_familys_names_of_keys(tmp_path: Path) -> None:
    """GPT-2's sizes have names of their own, and this config.json leaves all of them out."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}))
    work = forecast(path, Recipe("model", "gguf:Q4_K")).work
    assert (work.blocks, work.hidden, work.outer) == (12, 768, 50257 * 768)


@pytest.mark.parametrize("name", CASES)
def test_what_every_family_costs_is_estimated(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(completed(*CASES[name][:2])))
    work = forecast(tmp_path / "config.json", Recipe("model", "gguf:Q4_K")).work
    assert operations_estimate(work).total > 0
