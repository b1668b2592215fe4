"""EXL2 folders of every architecture that ExLlamaV2 loads.

Names and config.json are those that ExLlamaV2 0.3.2 reads. Our reader finds the same model in a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lqexport.converters.exl2 import writer as exl2_writer
from lqexport.converters.exl2.plan import plan_exl2
from lqexport.converters.exl2.reader import Exl2Model
from lqexport.converters.models.architectures import ARCHITECTURES
from lqexport.errors import UserError
from lqexport.models.blocks import BlockModel
from lqexport.models.modules import meta_model
from lqexport.models.written import PackedFolder
from lqexport.pipeline import exl2_mixes
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

SIZES = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "hidden_size": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
SIZES |= {"max_position_embeddings": 512}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e5}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]

ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
GATED = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
NORMS = {"input_layernorm", "post_attention_layernorm"}
MOE = {f"block_sparse_moe.experts.{expert}.w{i}" for expert in range(4) for i in (1, 2, 3)} | {"block_sparse_moe.gate"}

CASES: dict[str, tuple[str, dict[str, Any], set[str], dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {"rope_parameters": LLAMA3, "attention_bias": True},
        ATTENTION | GATED | NORMS,
        {"rope_theta": 1e4, "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}},
    ),
    "mistral": (
        "MistralConfig",
        {"sliding_window": 128},
        ATTENTION | GATED | NORMS,
        {"rope_theta": 1e4, "rope_scaling": None, "max_sequence_length": 128},
    ),
    "qwen2": (
        "Qwen2Config",
        {"rope_parameters": LINEAR},
        ATTENTION | GATED | NORMS,
        {"rope_theta": 7e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window": None},
    ),
    "gemma": ("GemmaConfig", {"head_dim": 32}, ATTENTION | GATED | NORMS, {"head_dim": 32, "rope_scaling": None}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16},
        ATTENTION | GATED | NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "attn_logit_softcapping": 50.0}
        | {"final_logit_softcapping": 30.0, "sliding_window_pattern": 2},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "num_hidden_layers": 3}
        | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT}, "layer_types": WINDOWS},
        ATTENTION
        | GATED
        | NORMS
        | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
        | {"self_attn.q_norm", "self_attn.k_norm"},
        {"architectures": ["Gemma3ForConditionalGeneration"], "rope_theta": 7e5, "sliding_window_pattern": 3}
        | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 32, "sliding_window": 16},
    ),
    "phi3": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
        ATTENTION | GATED | NORMS,
        {"rope_theta": 1e4, "original_max_position_embeddings": 256},
    ),
    "phi4": (
        "Phi3Config",
        {"partial_rotary_factor": 0.5},
        ATTENTION | GATED | NORMS,
        {"partial_rotary_factor": 0.5, "rope_scaling": None},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, ATTENTION | MOE | NORMS, {"num_local_experts": 4}),
    "starcoder2": (
        "Starcoder2Config",
        {"norm_epsilon": 1e-4},
        ATTENTION | {"mlp.c_fc", "mlp.c_proj"} | NORMS,
        {"layer_norm_epsilon": 1e-4},
    ),
}
"""Name -> transformers' config class, its options, the modules of a block, and entries of config.json.

The modules are those in `layer_keys` of ExLlamaV2's exllamav2/architecture.py. The entries are what its
exllamav2/config.py must read.
"""


def make_model(config_class: str, options: dict[str, Any]) -> PreTrainedModel:
    """Returns a random model. Norms and biases are random too, so that swapped tensors show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**SIZES | options)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(-0.5 if "Gemma" in config_class or name.endswith("bias") else 0.5, 1.0)
        else:
            parameter.data.normal_(0, 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def tokenizer_file(tiny_model: Path) -> bytes:
    return (tiny_model / "tokenizer.json").read_bytes()


def save(model: PreTrainedModel, folder: Path, tokenizer_file: bytes) -> str:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(folder)


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: bytes
) -> tuple[str, PreTrainedModel, Path]:
    """The name of a case, its model, and a folder with its EXL2 at about 8 bits, rounded to nearest."""
    config_class, options, _, _ = CASES[request.param]
    folder, model = tmp_path_factory.mktemp(request.param), make_model(config_class, options)
    source = save(model, folder / "hf", tokenizer_file)
    quantize(Recipe(source, "exl2", bits=8.4, head_bits=8, method="rtn"), folder / "artifact")
    exl2_writer.write(Artifact(folder / "artifact"), folder / "exl2")
    return request.param, model, folder


TOKENS = [int(token) for token in np.random.default_rng(0).integers(3, 480, 60)]


@torch.no_grad()
def logits_of(folder: Path) -> np.ndarray:
    model = BlockModel(PackedFolder(Exl2Model(folder)))
    states = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        states = model.run(block, states)
    return model.logits(states)[0].float().numpy()


def test_names_are_those_that_exllamav2_wants(case: tuple[str, PreTrainedModel, Path]) -> None:
    name, _, folder = case
    stored = load_file(folder / "exl2" / "model.safetensors")
    keys = {key.rpartition(".")[0] for key in stored}
    top = "language_model." if name == "gemma3" else ""
    for layer in (0, 1):
        prefix = f"{top}model.layers.{layer}."
        assert {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} == CASES[name][2]
    others = {key for key in keys if not key.startswith(f"{top}model.layers.")}
    assert others == {f"{top}model.embed_tokens", f"{top}model.norm", f"{top}lm_head"}
    packed = {key.removesuffix(".q_weight") for key in stored if key.endswith(".q_weight")}
    assert {key for key in keys if "norm" in key or key.endswith((".gate", "embed_tokens"))} == keys - packed


def test_config_is_what_exllamav2_reads(case: tuple[str, PreTrainedModel, Path]) -> None:
    name, _, folder = case
    config = json.loads((folder / "exl2" / "config.json").read_text())
    expected = CASES[name][3]
    assert {key: config.get(key, "absent") for key in expected} == expected
    scaling = config["rope_scaling"] or {}
    assert not {"type", "rope_theta"} & scaling.keys()
    if name == "phi3":
        assert scaling["long_factor"] == LONGROPE["long_factor"]


def test_the_folder_computes_as_the_source(case: tuple[str, PreTrainedModel, Path]) -> None:
    """At 8 bits the logits correlate with the source's, and every tensor is the artifact's to the bit.

    A few tokens go to other experts.
    """
    name, model, folder = case
    exl2_model, artifact = Exl2Model(folder / "exl2"), Artifact(folder / "artifact")
    assert set(exl2_model.names()) == set(artifact.manifest())
    for tensor in exl2_model.names():
        codec_name, planes, shape = exl2_model.planes(tensor)
        stored = artifact.read(tensor)
        assert (codec_name, shape) == (stored.codec_name, stored.shape)
        assert all(np.array_equal(planes[key], stored.planes[key]) for key in stored.planes)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0].float().numpy()
    correlation = np.corrcoef(logits_of(folder / "exl2").ravel(), expected.ravel())[0, 1]
    assert correlation > (0.97 if name == "mixtral" else 0.995)


@pytest.mark.parametrize("case_name", ["phi3", "mixtral", "starcoder2"])
def test_solved_in_mixes_and_orders(
    case_name: str, tmp_path: Path, text: Path, tokenizer_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a fused linear share the order and the widths of its columns. StarCoder2's c_proj keeps its order."""
    monkeypatch.setattr(exl2_mixes, "AVERAGES", (3.5,))
    source = save(make_model(*CASES[case_name][:2]), tmp_path / "hf", tokenizer_file)
    options: dict[str, Any] = {"samples": 2, "sequence_length": 64, "tune": 0, "descent": 0, "moments": "normalized"}
    quantize(Recipe(source, "exl2", bits=5, calibration=str(text), **options), tmp_path / "artifact")
    exl2_writer.write(Artifact(tmp_path / "artifact"), tmp_path / "exl2")
    exl2_model, artifact = Exl2Model(tmp_path / "exl2"), Artifact(tmp_path / "artifact")
    for name in exl2_model.names():
        assert all(
            np.array_equal(plane, artifact.read(name).planes[key]) for key, plane in exl2_model.planes(name)[1].items()
        )
    stored = load_file(tmp_path / "exl2" / "model.safetensors")
    kept = {name for name, plane in stored.items() if name.endswith("invperm") and (np.diff(plane) == 1).all()}
    assert len(kept) == (2 if case_name == "starcoder2" else 0)


@pytest.mark.parametrize("case", ["phi3"], indirect=True)
def test_parts_that_do_not_fit_together(case: tuple[str, PreTrainedModel, Path], tmp_path: Path) -> None:
    _, _, folder = case
    stored = load_file(folder / "exl2" / "model.safetensors")
    stored["model.layers.0.self_attn.k_proj.q_scale_max"] *= np.float16(2)
    safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "exl2" / "config.json").read_bytes())
    with pytest.raises(UserError, match="parts of a fused linear"):
        Exl2Model(tmp_path).read("model.layers.0.self_attn.qkv_proj.weight")
    rest = {name: plane for name, plane in stored.items() if ".0.self_attn.k_proj." not in name}
    safetensors.numpy.save_file(rest, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.layers\.0\.self_attn\.qkv_proj\.weight"):
        Exl2Model(tmp_path)


# What is refused


@pytest.mark.parametrize("case", ["phi3", "gemma3"], indirect=True)
def test_corrections_that_exllamav2_would_not_find(
    case: tuple[str, PreTrainedModel, Path], text: Path, tmp_path: Path
) -> None:
    recipe = Recipe(str(case[2] / "hf"), "exl2", bits=6, rank=4, calibration=str(text))
    with pytest.raises(UserError, match="leave out rank, or add merge"):
        quantize(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def described(config_class: str, **options: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    hf = getattr(transformers, config_class)(**SIZES | options)
    classes = {"architectures": [AutoModelForCausalLM._model_mapping[type(hf)].__name__]}
    config = json.loads(hf.to_json_string(use_diff=False)) | classes
    return config, {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}


YARN = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        ("Qwen2Config", {"rope_parameters": YARN}, "rope scaling of type 'yarn'"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "ExLlamaV2 computes LlamaForCausalLM with hidden_act 'silu'"),
        ("MixtralConfig", {"num_local_experts": 6}, "runs 4, 8, 16, 128 experts, not 6"),
        ("Gemma2Config", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            "Gemma3TextConfig",
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LINEAR}, "layer_types": WINDOWS}
            | {"num_hidden_layers": 3},
            "rotates within windows with rope_theta 10000",
        ),
        (
            "Phi3Config",
            {"rope_parameters": LONGROPE | {"attention_factor": 2.0}, "original_max_position_embeddings": 32},
            "longrope without attention_factor",
        ),
        ("Phi3Config", {"num_key_value_heads": 1}, r"qkv_proj.weight is \[96, 64\], not multiples of 32"),
        *((config_class, {}, "EXL2 folders of") for config_class in ("Qwen3Config", "GraniteConfig", "GPTNeoXConfig")),
    ],
)
def test_what_exllamav2_computes_otherwise_is_refused(config_class: str, options: dict[str, Any], message: str) -> None:
    config, shapes = described(config_class, **options)
    with pytest.raises(UserError, match=message):
        plan_exl2(config, shapes, bits=6, head_bits=6)


@pytest.mark.parametrize(
    ("config_class", "name", "has_bias", "message"),
    [
        ("Qwen2Config", "self_attn.o_proj", True, r"no place for model\.layers\.1\.self_attn\.o_proj\.bias"),
        ("Qwen2Config", "self_attn.q_proj", False, r"wants a tensor model\.layers\.1\.self_attn\.q_proj\.bias"),
        ("Starcoder2Config", "mlp.c_fc", False, r"wants a tensor model\.layers\.1\.mlp\.c_fc\.bias"),
        ("MistralConfig", "mlp.up_proj", True, r"no place for model\.layers\.1\.mlp\.up_proj\.bias"),
    ],
)
def test_biases_that_exllamav2_does_not_expect(config_class: str, name: str, has_bias: bool, message: str) -> None:
    config, shapes = described(config_class)
    plan_exl2(config, shapes, bits=6, head_bits=6)
    bias, weight = f"model.layers.1.{name}.bias", shapes[f"model.layers.1.{name}.weight"]
    shapes = {key: shape for key, shape in shapes.items() if key != bias} | ({bias: weight[:1]} if has_bias else {})
    with pytest.raises(UserError, match=message):
        plan_exl2(config, shapes, bits=6, head_bits=6)


def test_every_architecture_that_exllamav2_loads_has_a_case() -> None:
    classes = {
        AutoModelForCausalLM._model_mapping[getattr(transformers, config_class)].__name__
        for config_class, *_ in CASES.values()
    }
    known = {name for entry in ARCHITECTURES if entry.exl2 for name in entry.classes}
    # The text part of a model with images or sounds is written as the same entry's text model.
    assert classes == {name for name in known if not name.endswith("ForConditionalGeneration")}
