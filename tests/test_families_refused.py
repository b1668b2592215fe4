"""Models that a target cannot hold are refused before any work. Also OPT, and the text part of a model with images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from family_cases import (
    CASES,
    DEEPSEEK_ROPE,
    GEMMA3_ROPE,
    LLAMA3,
    LONGROPE,
    MIMO2_ROPE,
    MINISTRAL_ROPE,
    ONE_KEY_A_QUERY,
    YARN,
    config_and_shapes,
    export,
    make_model,
    make_tokenizer,
)
from family_cases import pieces as pieces
from family_cases import texts as texts
from gguf import GGUFValueType
from rewritten_files import Content, rewritten
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from lqexport.converters.exl2.plan import plan_exl2
from lqexport.converters.folders import native
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.models.architectures import ARCHITECTURES, architecture_of, normalized
from lqexport.converters.models.engine_checks import SAME_ACTIVATIONS
from lqexport.converters.models.refused import REFUSED, UNKNOWN, Refused
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact
from lqexport.target import Target
from lqexport.verification.verifying import verify

HALF_MSCALE = {"mscale": 0.5, "mscale_all_dim": 0.5}
HELIUM = {"general.architecture": "helium"}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def test_values_that_no_model_has_are_one_sentence() -> None:
    gemma, _ = config_and_shapes("gemma4")
    with pytest.raises(UserError, match=r"config\.json is damaged, or of another form"):
        normalized(gemma | {"num_kv_shared_layers": None})
    config, shapes = config_and_shapes("gemma2")
    with pytest.raises(UserError, match=r"up_proj.weight is empty: its shape is \[0, 64\]"):
        plan(Target.parse("gguf:Q4_0"), config, shapes | {"model.layers.0.mlp.up_proj.weight": (0, 64)})


def test_null_types_of_blocks_are_those_of_transformers() -> None:
    target = Target.parse("gguf:Q4_0")
    for name in ("gemma2", "gpt-oss"):
        config, shapes = config_and_shapes(name)
        assert plan(target, config | {"layer_types": None}, shapes) == plan(target, config, shapes)
        assert normalized(config | {"layer_types": None}).get("layer_types") in (None, config["layer_types"])


def test_opt_has_no_gguf_and_a_native_artifact(tmp_path: Path, texts: tuple[str, str]) -> None:
    torch.manual_seed(0)
    options = ONE_KEY_A_QUERY | {"ffn_dim": 96, "word_embed_proj_dim": 64}
    model = AutoModelForCausalLM.from_config(transformers.OPTConfig(**options))
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    source = str(tmp_path / "hf")
    for target in ("gguf:Q4_K", "gguf:F16"):
        with pytest.raises(UserError, match=r"llama\.cpp does not run OPTForCausalLM"):
            quantize(Recipe(source, target), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe = Recipe(source, "native:table-4", calibration=texts[0], samples=4, sequence_length=64, tune=0, descent=1)
    quantize(recipe, tmp_path / "native")
    result = verify(tmp_path / "native", source, text=texts[1], windows=1)
    assert result.warnings == result.failed == []
    assert result.evaluations[0].kl < 0.05


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ("qwen3", {"head_dim": 33}, "pairs of columns, and by config.json 33 are"),
        ("glm4moe", {"head_dim": 1}, "pairs of columns, and by config.json 0 are"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 32"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "every n-th block"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "every fourth block"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv None"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads equal to num_attention_heads"),
        ("glm4moe", {"n_group": 2}, "n_group 1"),
        ("minimax-m2", {"tie_word_embeddings": True}, "tie_word_embeddings False"),
        ("ernie4_5-moe", {"moe_layer_end_index": 1}, "moe_layer_end_index -1"),
        ("ernie4_5-moe", {"moe_layer_interval": 2}, "moe_layer_interval 1"),
        ("hunyuan-moe", {"attention_bias": True}, "attention_bias False"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling of type 'yarn'"),
        ("ministral3", {"rope_parameters": MINISTRAL_ROPE | {"mscale": 0.7}}, "without mscale, mscale_all_dim"),
        ("ministral3", {"rope_parameters": MINISTRAL_ROPE | {"beta_fast": 16}}, "without beta_fast"),
        ("ministral3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope scaling of type 'linear'"),
        ("mistral4", {"rope_parameters": MINISTRAL_ROPE | {"partial_rotary_factor": 0.5}}, "16 of 48 columns"),
        ("mistral4", {"n_group": 2}, "n_group 1"),
        ("mistral4", {"rope_parameters": MINISTRAL_ROPE | HALF_MSCALE}, "equal mscale and mscale_all_dim of 1"),
        (
            "deepseek-v32",
            {"rope_parameters": DEEPSEEK_ROPE},
            "mscale_all_dim of 1, and config.json has 0.707 and 0.707",
        ),
        ("deepseek-v4", {"index_head_dim": 96}, "index_head_dim 96 and head_dim 32"),
        ("deepseek-v4", {"head_dim": 128}, "index_head_dim 128 and head_dim 128"),
        ("deepseek-v4", {"compress_rate_hca": 64}, "'heavily_compressed_attention': 64"),
        ("deepseek-v4", {"hc_mult": 2}, "hc_mult 4"),
        ("deepseek-v4", {"rope_parameters": {"main": LINEAR, "compress": LINEAR}}, "rope scaling only in those"),
        ("deepseek-v4", {"rope_parameters": YARN | {"attention_factor": 1.2}}, "without attention_factor"),
        (
            "deepseek-v3",
            {"rope_parameters": YARN},
            "equal mscale and mscale_all_dim, and config.json has None and None",
        ),
        ("glm4", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "without attention_factor"),
        ("glm", {"rope_parameters": LLAMA3}, "rope scaling of type 'llama3'"),
        ("glm", {"head_dim": 32}, "add up to hidden_size"),
        ("hunyuan", {"attention_bias": True}, "attention_bias False"),
        ("olmo3", {"tie_word_embeddings": True}, "tie_word_embeddings False"),
        ("seed-oss", {"attention_out_bias": True}, "attention_out_bias False"),
        ("ernie4_5", {"use_bias": True}, "use_bias False"),
        ("arcee", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "without mscale, mscale_all_dim"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act 'relu2'"),
        ("apertus", {"tie_word_embeddings": True}, "tie_word_embeddings False"),
        ("gemma3n", {"laurel_rank": 32}, "laurel_rank 64"),
        ("gemma3n", {"final_logit_softcapping": 5.0}, r"final_logit_softcapping 30\.0"),
        ("gemma3n", {"activation_sparsity_pattern": [0.95, 0.0]}, "activation_sparsity_pattern"),
        ("gemma3n", {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
        ("falcon-mamba", {"mixer_rms_eps": 1e-6}, "mixer_rms_eps equal to layer_norm_epsilon"),
        ("kimi-linear", {"linear_num_heads": 2}, "linear_num_heads equal to num_attention_heads"),
        ("kimi-linear", {"moe_renormalize": False}, "norm_topk_prob True"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention None or False"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e5}}}, "10000"),
        ("olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}, "scaling within windows"),
        ("falcon", {"alibi": True}, "alibi"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm False"),
        ("cohere2", {"head_dim": 32}, "add up to hidden_size"),
        ("exaone4", {"sliding_window": 64}, "sliding_window None"),
        ("phi2", {"qk_layernorm": True}, "qk_layernorm False"),
        ("gptneox", {"tie_word_embeddings": True}, "tie_word_embeddings False, and config.json has True"),
        ("smollm3", {"attention_bias": True}, "attention_bias False"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias False"),
        ("mistral", {"partial_rotary_factor": 0.5}, "rotates whole heads of MistralForCausalLM"),
        ("olmo2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor of config.json is 0.5"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type yarn needs factor"),
        ("gemma2", {"sliding_window": None}, "sliding windows in some blocks, and config.json has none"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "sliding windows in some blocks, and config.json has none"),
        ("gemma3", {"rope_parameters": GEMMA3_ROPE | {"sliding_attention": LINEAR}}, "scaling within windows"),
        (
            "cohere2",
            {"layer_types": ["full_attention"] * 3},
            "sliding windows in some blocks, and config.json has none",
        ),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention None or 'vision'"),
        ("gemma4", {"per_layer_config": {"1": {"head_dim": 32}, "2": {"head_dim": 64}}}, "equal_full_blocks True"),
        ("gemma4", {"rope_parameters": GEMMA3_ROPE}, "rope scaling of type 'linear'"),
        ("gemma3", {"rope_parameters": LINEAR}, "must have settings of full_attention and sliding_attention"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual False"),
        ("qwen2vl", {"mrope_section": [2, 2, 3]}, "with the sum 8"),
        ("gpt-oss", {"rope_parameters": YARN | {"truncate": True}}, "yarn for GptOssForCausalLM without truncate"),
        ("gpt-oss", {"rope_parameters": YARN}, "yarn for GptOssForCausalLM without truncate"),
        ("llama4", {"attention_chunk_size": 4096}, "attention_chunk_size 8192"),
        ("llama4", {"attn_temperature_tuning": False}, "attn_temperature_tuning True"),
        ("llama4", {"moe_layers": [0, 1, 2, 3]}, r"moe_layers equal to usual_moe_layers.*\[1, 3\]"),
        ("llama4", {"layer_types": ["full_attention"] * 4}, "layer_types equal to usual_layer_types"),
        ("llama4", {"use_qk_norm": False}, "use_qk_norm equal to usual_qk_norm"),
        ("llama4", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth block"),
        ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit 7.0"),
        ("gpt-oss", {"attention_bias": False}, "attention_bias True"),
        ("granite", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
        ("lfm2", {"conv_bias": True}, "conv_bias False"),
        ("lfm2", {"head_dim": 32}, "add up to hidden_size"),
        ("lfm2moe", {"norm_topk_prob": False}, "norm_topk_prob True"),
        ("lfm2moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor 1.0"),
        ("nemotron-h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'relu2'"),
        ("falcon-h1-norm", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate False"),
        ("falcon-h1", {"attention_bias": True}, "attention_bias False"),
        ("mamba2", {"use_bias": True}, "use_bias False"),
        ("mamba2", {"expand": 4}, "expand 2"),
        ("nemotron-h", {"use_bias": True}, "use_bias False"),
        ("nemotron-h-moe", {"n_group": 2}, "n_group 1"),
        ("granite4", {"mamba_expand": 4, "mamba_d_head": "auto"}, "mamba_expand 2"),
        ("granite4", {"mamba_proj_bias": True}, "mamba_proj_bias False"),
        ("granite4", {"time_step_limit": [0.0, 1.0]}, "time_step_limit"),
        ("granite4moe", {"time_step_limit": [0.1, {"__float__": "Infinity"}]}, "time_step_limit"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "topk_method 'greedy'"),
        ("qwen3next", {"linear_value_head_dim": 16}, "linear_value_head_dim equal to linear_key_head_dim"),
        ("deepseek-v3", {"rope_parameters": DEEPSEEK_ROPE | {"mscale": 1.0}}, "without mscale, mscale_all_dim"),
        ("gemma2", {"attn_logit_softcapping": None}, "number for attn_logit_softcapping, and config.json has null"),
        ("gemma2", {"final_logit_softcapping": None}, "number for final_logit_softcapping, and config.json has null"),
        ("qwen3", {"max_position_embeddings": None}, "gives no max_position_embeddings"),
        ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "needs 8 numbers in long_factor"),
        ("mamba", {"use_bias": True}, "use_bias False"),
        ("jamba-moe", {"mamba_proj_bias": True}, "mamba_proj_bias False"),
        ("mimo2", {"routed_scaling_factor": 2.5}, "routed_scaling_factor 1.0 or None"),
        ("mimo2", {"rope_parameters": MIMO2_ROPE | {"full_attention": LINEAR}}, "one_rotated_share True"),
        ("exaone-moe", {"layer_types": ["full_attention"] * 4}, "sliding windows in some blocks"),
        ("afmoe", {"mup_enabled": False}, "mup_enabled True"),
        ("afmoe", {"layer_types": ["sliding_attention", "full_attention"] * 2}, "global_attn_every_n_layers 4"),
        ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads equal to num_attention_heads"),
    ],
)
def test_what_llamacpp_computes_otherwise_is_refused_before_any_work(
    name: str, change: dict[str, Any], message: str
) -> None:
    config, shapes = config_and_shapes(name)
    plan(Target.parse("gguf:Q4_K"), config, shapes)
    with pytest.raises(UserError, match=message):
        plan(Target.parse("gguf:Q4_K"), config | change, shapes)
    plan(Target.parse("native:table-4"), config | change, shapes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"hidden_act": "swish"}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
        ("starcoder2", {"hidden_act": "gelu_new"}),
        ("gptneox", {"hidden_act": "gelu_python"}),
        ("gemma3", {"hidden_activation": "gelu_fast"}),
    ],
)
def test_other_names_of_an_activation(name: str, change: dict[str, Any]) -> None:
    config, shapes = config_and_shapes(name)
    assert plan(Target.parse("gguf:Q4_K"), config | change, shapes) == plan(Target.parse("gguf:Q4_K"), config, shapes)


@pytest.mark.parametrize(("name", "other"), SAME_ACTIVATIONS.items())
def test_activations_of_two_names_are_the_same(name: str, other: str) -> None:
    inputs = torch.linspace(-8, 8, 1000)
    assert torch.allclose(ACT2FN[name](inputs), ACT2FN[other](inputs), atol=1e-5)


def test_exl2_has_no_rope_scaling_within_windows() -> None:
    config, shapes = config_and_shapes("gemma3")
    change = {"rope_parameters": GEMMA3_ROPE | {"sliding_attention": LINEAR}}
    with pytest.raises(UserError, match="ExLlamaV2 has no rope scaling within windows"):
        plan_exl2(config | change, shapes, bits=4, head_bits=6)


def without_biases(name: str, folder: Path) -> Path:
    """Writes the model of a case without the biases of its linears, and its tokenizer."""
    make_model(name).save_pretrained(folder)
    make_tokenizer("gpt-2", folder).save_pretrained(folder)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    left = {key: tensor for key, tensor in stored.items() if "norm" in key or not key.endswith(".bias")}
    safetensors.torch.save_file(left, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.llamacpp
def test_a_checkpoint_may_lack_biases_that_its_class_has(tmp_path: Path, texts: tuple[str, str]) -> None:
    """transformers sets them to 0."""
    source = str(without_biases("qwen2", tmp_path / "hf"))
    options = {"calibration": texts[0], "samples": 4, "sequence_length": 64, "descent": 1}
    path = export(tmp_path, Recipe(source, "gguf:Q4_K", **options))  # type: ignore[arg-type]
    for engine in ("lqexport", "llama.cpp"):
        result = verify(path, source, text=texts[1], windows=1, engine=engine, artifact=tmp_path / "artifact-Q4_K")
        assert result.failed == result.warnings == []
        assert result.evaluations[0].kl < 0.05


@pytest.mark.parametrize("name", ["starcoder2", "gpt2", "gptneox", "phi2"])
def test_biases_that_llamacpp_needs(name: str) -> None:
    config, shapes = config_and_shapes(name)
    plan(Target.parse("gguf:F16"), config, shapes)
    left = {key: shape for key, shape in shapes.items() if not key.endswith(".bias")}
    with pytest.raises(UserError, match="only with all biases"):
        plan(Target.parse("gguf:F16"), config, left)
    plan(Target.parse("native:table-4"), config, left)


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.family)
def test_refused_architectures_are_refused_with_their_reason(entry: Refused) -> None:
    for name in entry.classes:
        with pytest.raises(UserError, match=re.escape(f"{name} ({entry.family}) is not supported: {entry.reason}.")):
            architecture_of({"architectures": [name]})
        assert not any(name in known.classes for known in ARCHITECTURES)


def test_llamacpp_loads_models_with_an_indexer_only_with_keys_and_values_apart(tmp_path: Path) -> None:
    """llama.cpp does not load latent attention whose `kv_b_proj` is one tensor as a model of these architectures."""
    make_model("deepseek-v3").save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    for name in ("glm-dsa", "deepseek32"):
        other = rewritten(path, tmp_path / f"{name}.gguf", lambda content, name=name: _as_indexed(content, name))
        with pytest.raises(UserError, match=r"attn_k_b\.weight' not found"), LlamaCpp(other, 8, threads=1):
            pass


def _as_indexed(content: Content, name: str) -> None:
    """Makes the content of a DeepSeek V3 file that of an architecture with an indexer, without its tensors."""
    content.values["general.architecture"] = name
    for key in [key for key in content.values if key.startswith("deepseek2.")]:
        new = key.replace("deepseek2", name)
        content.values[new], content.types[new] = content.values.pop(key), content.types.pop(key)
    sizes = {"indexer.head_count": 4, "indexer.key_length": 32, "indexer.top_k": 64, "head_count_kv": 1}
    sizes |= {"key_length_mla": 48, "value_length_mla": 24, "key_length": 80, "value_length": 64}
    for key, size in sizes.items():
        content.add(f"{name}.attention.{key}", size, GGUFValueType.UINT32)


def test_transformers_lacks_models_that_are_refused_for_that() -> None:
    assert not any(
        hasattr(transformers, name) for entry in REFUSED if entry.reason == UNKNOWN for name in entry.classes
    )


@pytest.mark.llamacpp
def test_llamacpp_lacks_helium(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    path = export(tmp_path, Recipe(str(tmp_path / "hf"), "gguf:F16"))
    other = rewritten(path, tmp_path / "helium.gguf", lambda content: content.values.update(HELIUM))
    with pytest.raises(UserError, match="unknown model architecture: 'helium'"), LlamaCpp(other, 8, threads=1):
        pass


@pytest.mark.parametrize("name", CASES)
def test_an_output_of_its_own_counts_though_it_is_said_to_be_tied(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture uses such an output, as transformers 5 does, or refuses it with a sentence."""
    class_name, options, tokenizer = CASES[name]
    factors = ("embedding_multiplier", "lm_head_multiplier") if "lm_head_multiplier" in options else ()
    options = options | {"tie_word_embeddings": True} | dict.fromkeys(factors, 1.0)
    monkeypatch.setitem(CASES, name, (class_name, options, tokenizer))
    model, folder = make_model(name), tmp_path / "hf"
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    embedding = model.get_input_embeddings().weight.detach()
    output = "embed_out.weight" if name.startswith("gptneox") else "lm_head.weight"
    tensors[output] = embedding.flip(0)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder))
    assert not source.config["tie_word_embeddings"]
    expected = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight
    assert torch.equal(expected, source.read("lm_head.weight"))
    shapes = {key: source.shape(key) for key in source.names()}
    if True in architecture_of(source.config).fixed.get("tie_word_embeddings", ()):
        with pytest.raises(UserError, match="and the model's output is not its embedding"):
            plan(Target.parse("gguf:F16"), source.config, shapes)
    else:
        planned = plan(Target.parse("gguf:F16"), source.config, shapes)
        assert "lm_head.weight" in {tensor.name for tensor in planned}
    tensors[output] = embedding.clone()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_source(str(folder)).config["tie_word_embeddings"]


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_llamacpp_computes_with_an_output_of_its_own(
    name: str, tmp_path: Path, pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class_name, options, tokenizer = CASES[name]
    monkeypatch.setitem(CASES, name, (class_name, options | {"tie_word_embeddings": False}, tokenizer))
    model, folder = make_model(name), tmp_path / "hf"
    model.save_pretrained(folder)
    make_tokenizer(tokenizer, pieces).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = list(range(3, 40))
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    with LlamaCpp(export(tmp_path, Recipe(str(folder), "gguf:F16")), 48, threads=1) as engine:
        assert np.abs(engine.logits(tokens) - expected).mean() < 0.003


@pytest.mark.parametrize("name", ["qwen3", "granite", "falcon"])
def test_exl2_is_refused_by_name(name: str) -> None:
    config, shapes = config_and_shapes(name)
    with pytest.raises(UserError, match=f"EXL2 folders of {config['architectures'][0]}"):
        plan_exl2(config, shapes, bits=4, head_bits=6)


@pytest.mark.parametrize(
    ("name", "family", "rope", "pattern", "prefix"),
    [
        ("gemma3", "Gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "^", "language_model."),
        ("mistral", "Mistral3", {"rope_theta": 1e4}, "^", "language_model."),
        ("gemma3n", "Gemma3n", {"rope_scaling": None}, r"^model\.", "model.language_model."),
        ("ministral3", "Mistral3", {"rope_parameters": MINISTRAL_ROPE}, "^", "language_model."),
        ("ministral3", "Mistral3", {"rope_parameters": MINISTRAL_ROPE}, r"^model\.", "model.language_model."),
        ("mistral4", "Mistral3", {"rope_parameters": CASES["mistral4"][1]["rope_parameters"]}, "^", "language_model."),
    ],
)
def test_text_part_of_a_model_with_images(
    tmp_path: Path, name: str, family: str, rope: dict[str, Any], pattern: str, prefix: str
) -> None:
    """Models as on the hub: sizes in text_config, other tensor names, parts besides the text model."""
    model = make_model(name)
    model.save_pretrained(tmp_path / "text")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "text")
    shutil.copytree(tmp_path / "text", tmp_path / "images")
    config = json.loads((tmp_path / "text/config.json").read_text())
    text = {key: value for key, value in config.items() if key not in ("architectures", "rope_parameters")}
    whole = {"architectures": [f"{family}ForConditionalGeneration"], "model_type": family.lower()}
    whole["text_config"] = text | rope
    (tmp_path / "images/config.json").write_text(json.dumps(whole))
    tensors = safetensors.torch.load_file(tmp_path / "text/model.safetensors")
    renamed = {re.sub(pattern, prefix, tensor_name): tensor for tensor_name, tensor in tensors.items()}
    vision = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(8)}
    safetensors.torch.save_file(renamed | vision, tmp_path / "images/model.safetensors")
    files = []
    for folder in (tmp_path / "text", tmp_path / "images"):
        path = export(folder, Recipe(str(folder), "gguf:F16"))
        metadata = {key: value for key, value in GGUFModel(path).metadata.items() if not key.startswith("lqexport.")}
        manifest = Artifact(folder / "artifact-F16").manifest()
        files.append((metadata | {"general.name": None}, manifest))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "qwen3next", "granite4"])
def test_native_folders_that_transformers_could_not_load(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "hf")
    quantize(Recipe(str(tmp_path / "hf"), "native:affine-4-g32", method="rtn"), tmp_path / "artifact")
    with pytest.raises(UserError, match="transformers keeps the linears"):
        native.write(Artifact(tmp_path / "artifact"), tmp_path / "folder")
