"""Every architecture of the table: a small random model of it, with a tokenizer as its family has, in unmodified
llama.cpp against transformers."""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lqexport.artifact import Artifact, StoredTensor
from lqexport.blocks import BlockModel
from lqexport.collect import to_the_end
from lqexport.converters import gguf, native
from lqexport.converters.architecture import Architecture
from lqexport.converters.architectures import ARCHITECTURES, architecture_of, find_architecture
from lqexport.converters.exl2_plan import plan_exl2
from lqexport.converters.gguf_pretokenizers import PRETOKENIZERS
from lqexport.converters.gguf_read import GGUFModel
from lqexport.converters.gguf_types import MIXES
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.formats.registry import codec
from lqexport.llamacpp import LlamaCpp
from lqexport.llamacpp import quantize as llamacpp_quantize
from lqexport.modules import expected_shapes
from lqexport.pipeline import quantize
from lqexport.recipe import Recipe
from lqexport.smoothing import Smoothed, pairs
from lqexport.source import open_source
from lqexport.verifying import verify

SPECIAL = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
NARROW = SPECIAL | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ONE_KEY_A_QUERY = NARROW | {"intermediate_size": 96, "max_position_embeddings": 512}
SIZES = ONE_KEY_A_QUERY | {"num_key_value_heads": 2}
GPT2_SIZES = SPECIAL | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1 + i / 8 for i in range(8)], "long_factor": [1.5 + i for i in range(8)]}
YARN = {"rope_type": "yarn", "factor": 16.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
WIDE_HEADS = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOWS = {
    "rope_parameters": GEMMA3_ROPE,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LATENT = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24}
DEEPSEEK_ROPE = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
DEEPSEEK = ONE_KEY_A_QUERY | LATENT | {"num_hidden_layers": 3, "rope_parameters": DEEPSEEK_ROPE}
DEEPSEEK |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
DEEPSEEK_V3 = DEEPSEEK | {"n_group": 4, "topk_group": 2, "n_shared_experts": 1}
DEEPSEEK_V2 = DEEPSEEK | {"n_shared_experts": 2, "routed_scaling_factor": 1.5}
# llama.cpp knows these by their number of blocks. What is rounded may send a token to other experts in each of them.
PLAIN_QUERIES = {"q_lora_rank": None, "num_hidden_layers": 26, "first_k_dense_replace": 25}
PLAIN_QUERIES |= {"n_routed_experts": 4, "num_experts_per_tok": 2}
UNSMOOTHED = ("mixtral", "qwen3moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-lite")
UNSMOOTHED += ("olmo2", "falcon", "falcon-7b")
"""Cases without a norm that gives the inputs of some linears and nothing else, or with experts."""
SCALES = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.5}

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", SIZES | {"rope_parameters": LLAMA3}, "llama-bpe"),
    "mistral": ("MistralConfig", SIZES | {"head_dim": 32}, "pieces"),
    "qwen2": ("Qwen2Config", SIZES | {"rope_parameters": YARN}, "qwen2"),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": YARN}, "qwen2"),
    "gemma2": ("Gemma2Config", SIZES | WIDE_HEADS, "pieces without prefix"),
    "gemma3": ("Gemma3TextConfig", SIZES | WIDE_HEADS | WINDOWS, "pieces without prefix"),
    "phi3": ("Phi3Config", SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}, "pieces"),
    "phi3-short": (
        "Phi3Config",
        SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
        "pieces",
    ),
    "phi4": ("Phi3Config", SIZES | {"partial_rotary_factor": 0.5}, "smaug-bpe"),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4}, "pieces"),
    "qwen3moe": ("Qwen3MoeConfig", SIZES | EXPERTS | {"head_dim": 32, "rope_parameters": YARN}, "qwen2"),
    "deepseek-v3": ("DeepseekV3Config", DEEPSEEK_V3 | {"q_lora_rank": 32}, "deepseek-v3"),
    "deepseek-v3-lite": ("DeepseekV3Config", DEEPSEEK_V3 | PLAIN_QUERIES | {"n_group": 2}, "smaug-bpe"),
    "deepseek-v2": ("DeepseekV2Config", DEEPSEEK_V2 | {"q_lora_rank": 32}, "smaug-bpe"),
    "deepseek-v2-lite": ("DeepseekV2Config", DEEPSEEK_V2 | PLAIN_QUERIES, "smaug-bpe"),
    "olmo2": ("Olmo2Config", SIZES, "smaug-bpe"),
    "smollm3": ("SmolLM3Config", SIZES | {"num_hidden_layers": 4, "rope_parameters": YARN}, "llama-bpe"),
    "granite": ("GraniteConfig", SIZES | SCALES, "smollm"),
    "starcoder2": ("Starcoder2Config", SIZES, "smollm"),
    "falcon": ("FalconConfig", NARROW | {"num_kv_heads": 2, "new_decoder_architecture": True}, "falcon"),
    "falcon-7b": ("FalconConfig", NARROW, "falcon"),
    "gptneox": ("GPTNeoXConfig", ONE_KEY_A_QUERY, "gpt-2"),
    "gptneox-serial": ("GPTNeoXConfig", ONE_KEY_A_QUERY | {"use_parallel_residual": False}, "gpt-2"),
    "gpt2": ("GPT2Config", GPT2_SIZES, "gpt-2"),
}
"""Name -> transformers' config class, its options, and the kind of tokenizer."""

STRINGS = (
    "Hello world",
    " two  spaces   and\ttabs\n\nnew lines \n ends with space ",
    "it's they'LL WE'VE I'd x's 'quoted'",
    "numbers 1 12 123 1234 12345.678",
    "def f(x):\n    return x[1:-1]  # ok\n\n\n\tif True:\n        pass",
    "naïve café Größe",
    "日本語のテキスト 中文，标点。 한국어",
    "emoji 🙂👩‍👩‍👧 flags 🇫🇷",
    "camelCase HTMLParser snake_case\r\nwindows\r\n\r\n",
    "<s>with</s> special<tool>tokens",
    "a",
    " ",
)


def make_model(name: str) -> PreTrainedModel:
    """Random, with logits of unit scale; norms and biases are random too, so that a mix-up shows."""
    torch.manual_seed(0)
    kind, options, _ = CASES[name]
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or ".ln_" in parameter_name:
            low = -0.5 if "gemma" in name or parameter_name.endswith("bias") else 0.5
            parameter.data.uniform_(low, low + 1)
        else:
            parameter.data.normal_(0, 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    if model.config.num_hidden_layers > 10:  # so that what is rounded does not grow with depth
        for parameter_name, parameter in model.named_parameters():
            parameter.data *= 0.2 if parameter_name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")) else 1
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("_bias"):
            buffer.normal_(0, 0.2)
    return model


def corpus() -> list[str]:
    return [*inspect.getsource(argparse).splitlines(keepends=True)[:600], *STRINGS * 3]


FALCON_SPLITTER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)


def isolating(expressions: tuple[str, ...]) -> pre_tokenizers.Sequence:
    """Splits by one expression after the other."""
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(splitter: str) -> Tokenizer:
    """A byte-level BPE that splits words as llama.cpp's splitter of that name."""
    (expressions, ignore_merges) = next(asked for asked, name in PRETOKENIZERS.items() if name == splitter)
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = FALCON_SPLITTER if splitter == "falcon" else isolating(expressions)
    tokenizer.normalizer = normalizers.NFC() if splitter == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a SentencePiece BPE, prefix.model, and one that puts no space before a text, bare.model."""
    folder = tmp_path_factory.mktemp("pieces")
    for name, prefix in (("prefix", True), ("bare", False)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus()),
            model_prefix=str(folder / name),
            model_type="bpe",
            vocab_size=480,
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=prefix,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    return folder


def of_pieces(path: Path, *, prefix: bool) -> Tokenizer:
    """The tokenizer.json that transformers makes of a tokenizer.model: merges in the order of the scores."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece in sorted(ids, key=lambda p: -model.get_score(ids[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found = [(left, right) for left, right in halves if left in ids and right in ids]
        merges += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.pre_tokenizer = None if prefix else pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def make_tokenizer(kind: str, pieces: Path) -> PreTrainedTokenizerFast:
    """Of the tokens <s>, </s>, <unk>, a user-defined <tool> and some 480 others; it begins a text with <s>."""
    if kind.startswith("pieces"):
        tokenizer = of_pieces(pieces / ("prefix.model" if kind == "pieces" else "bare.model"), prefix=kind == "pieces")
    else:
        tokenizer = byte_level(kind)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@dataclass
class Case:
    """A model, its folder, and its exports in F16."""

    name: str
    model: PreTrainedModel
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    f16: Path

    @property
    def source(self) -> str:
        return str(self.folder / "hf")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> Iterator[Case]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model, tokenizer = make_model(name), make_tokenizer(CASES[name][2], pieces)
    model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    yield Case(name, model, folder, tokenizer, export(folder, Recipe(str(folder / "hf"), "gguf:F16")))
    shutil.rmtree(folder)


def export(folder: Path, recipe: Recipe) -> Path:
    name = recipe.target.partition(":")[2]
    quantize(recipe, folder / f"artifact-{name}")
    gguf.write(Artifact(folder / f"artifact-{name}"), folder / f"{name}.gguf")
    return folder / f"{name}.gguf"


TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 60))]


@torch.no_grad()
def expected_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def continued(engine: LlamaCpp, tokens: list[int], more: int) -> list[int]:
    """`tokens` and the most probable ones after them."""
    for _ in range(more):
        tokens = [*tokens, int(engine.logits(tokens, len(tokens) - 1)[-1].argmax())]
    return tokens


@pytest.mark.llamacpp
def test_logits_and_continuations_are_those_of_transformers(case: Case) -> None:
    expected = expected_logits(case.model, TOKENS)
    assert 0.5 < expected.std() < 2
    with LlamaCpp(case.f16, 80, threads=1) as engine:
        logits = engine.logits(TOKENS)
        continuation = continued(engine, TOKENS, 6)
    assert np.abs(logits - expected).mean() < 0.003
    # With every prefix at once: position t of the model's output sees the tokens up to t.
    chosen = expected_logits(case.model, continuation).argmax(1)[len(TOKENS) - 1 : -1]
    assert continuation[len(TOKENS) :] == chosen.tolist()


@pytest.mark.llamacpp
def test_tokens_are_those_of_transformers(case: Case) -> None:
    with LlamaCpp(case.f16, 32, threads=1) as engine:
        for text in STRINGS:
            assert engine.tokenize(text) == case.tokenizer(text, add_special_tokens=False).input_ids, text


def test_file_comes_back_as_the_model(case: Case) -> None:
    """Names, config and row orders of the file, read by ourselves, give the same logits."""
    source = open_source(str(case.f16))
    assert set(source.names()) == set(open_source(case.source).names()) - {tied_output(case)}
    model = BlockModel(source)
    states = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        states = model.run(block, states)
    assert np.abs(model.logits(states)[0].numpy() - expected_logits(case.model, TOKENS)).mean() < 0.003


def tied_output(case: Case) -> str | None:
    return architecture_of(case.model.config.to_dict()).output if case.model.config.tie_word_embeddings else None


@pytest.mark.llamacpp
def test_q8_0(case: Case) -> None:
    """llama.cpp rounds activations to 8 bits, so logits are near and not equal; a few tokens go to other experts."""
    path = export(case.folder, Recipe(case.source, "gguf:Q8_0", method="rtn"))
    with LlamaCpp(path, 64, threads=1) as engine:
        logits = engine.logits(TOKENS)
    experts = architecture_of(case.model.config.to_dict()).experts
    least = 0.95 if case.name.startswith("deepseek") else 0.97 if experts else 0.998
    found = np.corrcoef(logits.ravel(), expected_logits(case.model, TOKENS).ravel())[0, 1]
    assert found > least


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Files to calibrate and to evaluate on."""
    folder, source = tmp_path_factory.mktemp("texts"), inspect.getsource(argparse)
    (folder / "calibration.txt").write_text(source[30000:45000])
    (folder / "evaluation.txt").write_text(source[50000:53000])
    return str(folder / "calibration.txt"), str(folder / "evaluation.txt")


@pytest.mark.llamacpp
def test_quantized_and_verified(case: Case, texts: tuple[str, str]) -> None:
    """Q4_K's blocks do not fit these narrow models: its fallback, Q5_0, is solved, exported and verified by both."""
    recipe = Recipe(case.source, "gguf:Q4_K", calibration=texts[0], samples=4, sequence_length=64, tune=0, descent=1)
    path = export(case.folder, recipe)
    for engine in ("lqexport", "llama.cpp"):
        found = verify(
            path, case.source, text=texts[1], windows=1, engine=engine, artifact=case.folder / "artifact-Q4_K"
        )
        assert found.warnings == found.failed == []
        assert all(tensor.same_bytes for tensor in found.tensors)
        assert found.evaluations[0].kl < (0.1 if case.name.startswith("deepseek") else 0.05)


def test_the_table_says_where_outputs_are_added_as_they_are(case: Case) -> None:
    """Those of attention, without the MLP after it, and of the MLP."""
    model = BlockModel(open_source(case.source))
    hidden, architecture = model.start(torch.tensor([TOKENS])), model.architecture
    (attention,) = modules_called(architecture, "attn_output")
    last = modules_called(architecture, "ffn_down", "ffn_down_exps", "ffn_down_shexp")
    for linear, without in ((attention, last), *((only, []) for only in last if len(last) == 1)):
        block = model.block(len(model) - 1)
        for other in without:
            silence(block, other)
        lacking = to_the_end(model, block, linear, hidden)[1]
        silence(block, linear)
        assert torch.allclose(model.run(block, hidden), lacking, atol=1e-5) == architecture.adds


def test_smoothing_changes_nothing(case: Case) -> None:
    """Whatever is moved from a norm into the linears after it."""
    source = open_source(case.source)
    plain, draw = BlockModel(source), torch.Generator().manual_seed(1)
    found = pairs(plain.architecture, len(plain))
    assert bool(found) == (case.name not in UNSMOOTHED)
    sizes = {pair: source.shape(f"{pair.giver}.weight")[0] for pair in found}
    scales = {pair: torch.randint(-2, 3, (size,), generator=draw).float().exp2() for pair, size in sizes.items()}
    smoothed = BlockModel(Smoothed(source, scales))
    plain_states, states = plain.start(torch.tensor([TOKENS])), smoothed.start(torch.tensor([TOKENS]))
    for index in range(len(plain)):
        plain_states = plain.run(plain.block(index), plain_states)
        states = smoothed.run(smoothed.block(index), states)
    assert torch.allclose(states, plain_states, atol=1e-4)


def test_weights_kept_in_bfloat16_are_those_that_autocast_makes(case: Case) -> None:
    """Forward, and the gradient that leads back."""
    model = BlockModel(open_source(case.source), compute_dtype=torch.bfloat16)
    hidden = model.start(torch.tensor([TOKENS]))
    for index in range(len(model)):
        kept, cast = model.block(index), model.block(index)
        for name in model.linears(index):
            weight = model.weights.read(model.weight_name(index, name))
            assert kept.get_submodule(name).weight.dtype == torch.bfloat16
            cast.get_submodule(name).weight.data = weight.float()
        found = []
        for block in (kept, cast):
            inputs = hidden.clone().requires_grad_()
            output = model.run(block, inputs)
            found.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        assert not torch.equal(hidden, found[0][0])
        hidden = found[0][0].detach()


def modules_called(architecture: Architecture, *names: str) -> list[str]:
    """By what they are called in GGUF."""
    return [module for module, gguf in architecture.modules_of(architecture.leading).items() if gguf in names]


def silence(block: torch.nn.Module, linear: str) -> None:
    """Let a linear say nothing."""
    for parameter in block.get_submodule(linear).parameters():
        parameter.data.zero_()


# What cannot be


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
    found = verify(tmp_path / "native", source, text=texts[1], windows=1)
    assert found.warnings == found.failed == []
    assert found.evaluations[0].kl < 0.05


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'silu'"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 32"),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "every n-th block"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "every fourth block"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling of type 'yarn'"),
        ("falcon", {"alibi": True}, "alibi"),
        ("granite", {"rope_parameters": {"rope_type": "proportional"}}, "'proportional'"),
        ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "topk_method 'greedy'"),
        ("deepseek-v3", {"rope_parameters": DEEPSEEK_ROPE | {"mscale": 1.0}}, "without mscale, mscale_all_dim"),
    ],
)
def test_what_llamacpp_computes_otherwise_is_refused_before_any_work(
    name: str, change: dict[str, Any], said: str
) -> None:
    config, shapes = config_and_shapes(name)
    plan("gguf:Q4_K", config, shapes)
    with pytest.raises(UserError, match=said):
        plan("gguf:Q4_K", config | change, shapes)
    plan("native:table-4", config | change, shapes)


def config_and_shapes(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    model = make_model(name)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    return config, expected_shapes(config)


@pytest.mark.parametrize("name", ["qwen3", "granite", "falcon"])
def test_exl2_is_refused_by_name(name: str) -> None:
    config, shapes = config_and_shapes(name)
    with pytest.raises(UserError, match=f"EXL2 folders of {config['architectures'][0]}"):
        plan_exl2(config, shapes, bits=4, head_bits=6)


def test_text_part_of_a_model_with_images(tmp_path: Path) -> None:
    """Gemma 3 of 4B and more, as the hub has them: sizes in text_config, names of their own, more parts."""
    model = make_model("gemma3")
    model.save_pretrained(tmp_path / "text")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "text")
    shutil.copytree(tmp_path / "text", tmp_path / "images")
    config = json.loads((tmp_path / "text/config.json").read_text())
    text = {key: value for key, value in config.items() if key not in ("architectures", "rope_parameters")}
    text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "images/config.json").write_text(json.dumps(whole))
    tensors = safetensors.torch.load_file(tmp_path / "text/model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    vision = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(8)}
    safetensors.torch.save_file(renamed | vision, tmp_path / "images/model.safetensors")
    files = []
    for name in ("text", "images"):
        path = export(tmp_path / name, Recipe(str(tmp_path / name), "gguf:F16"))
        metadata = {key: value for key, value in GGUFModel(path).metadata.items() if not key.startswith("lqexport.")}
        manifest = Artifact(tmp_path / name / "artifact-F16").manifest()
        files.append((metadata | {"general.name": None}, manifest))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_native_folders_that_transformers_could_not_load(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "hf")
    quantize(Recipe(str(tmp_path / "hf"), "native:affine-4-g32", method="rtn"), tmp_path / "artifact")
    with pytest.raises(UserError, match="transformers keeps the linears"):
        native.write(Artifact(tmp_path / "artifact"), tmp_path / "folder")


# Experts


def test_experts_that_no_token_reaches(tmp_path: Path, texts: tuple[str, str]) -> None:
    """The router finds all experts alike, so every token goes to the same two of eight: the others are solved as if all
    inputs weighed alike."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES | EXPERTS | {"num_experts": 8, "head_dim": 32, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.gate.weight.data.zero_()
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    for prefix, moments in (("full", "guided"), ("quantized", "normalized")):
        recipe = Recipe(str(tmp_path / "hf"), "gguf:Q4_0", calibration=texts[0], samples=2, sequence_length=64, tune=0,
                        descent=1, prefix=prefix, moments=moments)  # fmt: skip
        report = quantize(recipe, tmp_path / prefix)
        errors = {t["name"]: t["relative_error"] for t in report["tensors"] if ".experts." in t["name"]}
        assert len(errors) == 24
        assert max(errors.values()) < 0.05


@pytest.mark.parametrize(
    "options", [{"target": "gguf:auto", "size": "5bpw"}, {"asymmetric": True, "prefix": "quantized"}]
)
def test_what_experts_do_not_allow_yet(tmp_path: Path, options: dict[str, Any]) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "hf")
    options = {"target": "gguf:Q4_K", "moments": "guided" if "size" in options else "normalized"} | options
    with pytest.raises(UserError, match="cannot be used for experts"):
        quantize(Recipe(str(tmp_path / "hf"), **options), tmp_path / "out")


def test_experts_of_a_block_share_their_type() -> None:
    config, shapes = config_and_shapes("mixtral")
    everything = plan("gguf:Q8_0", config, shapes, types={"*.experts.*.down_proj.weight": "gguf:Q4_0"})
    assert {tensor.codec for tensor in everything if "down_proj" in tensor.name} == {"gguf:Q4_0"}
    with pytest.raises(UserError, match="experts of a block in one type"):
        plan("gguf:Q8_0", config, shapes, types={"*.experts.1.down_proj.weight": "gguf:Q4_0"})


# Mixes


class Zeros(Artifact):
    """A finished artifact in F16 of a model that weighs nothing, without files for its tensors."""

    def __init__(self, folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(folder)
        self._config, self._planned = config, plan("gguf:F16", config, shapes)

    def config(self) -> dict[str, Any]:
        return self._config

    def run(self) -> dict[str, Any]:
        return {}

    def manifest(self) -> dict[str, dict[str, Any]]:
        return {t.name: {"codec": t.codec, "shape": list(t.shape), "sha256": ""} for t in self._planned}

    def read_listed(self, name: str, codec_name: str, shape: tuple[int, ...], sha256: str) -> StoredTensor:
        matrix = shape if len(shape) == 2 else (1, shape[0])
        planes = {key: np.zeros(form, dtype) for key, (dtype, form) in codec(codec_name).layout(*matrix).items()}
        return StoredTensor(name, codec_name, shape, planes)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Zeros]]:
    """Makes a case's model of 256 columns, in which K-quants fit, and 17 blocks: its F16.gguf and artifact."""

    @functools.cache
    def make(name: str, **more: Any) -> tuple[Path, Zeros]:
        kind, options, _ = CASES[name]
        kept = {key: value for key, value in options.items() if key not in ("rope_parameters", "layer_types")}
        sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 17, "moe_intermediate_size": 256}
        sizes |= {"n_embd": 256, "n_layer": 17, "num_local_experts": 8} | more
        if options.get("q_lora_rank", 0) is None:
            del sizes["num_hidden_layers"]
        hf = getattr(transformers, kind)(**{key: sizes.get(key, value) for key, value in kept.items()})
        classes = {"architectures": [AutoModelForCausalLM._model_mapping[type(hf)].__name__]}
        config = json.loads(hf.to_json_string(use_diff=False)) | classes
        artifact = Zeros(tmp_path_factory.mktemp("wide"), config, expected_shapes(config))
        make_tokenizer("gpt-2", artifact.folder).save_pretrained(artifact.model_folder)
        return gguf.write(artifact, artifact.folder / "F16.gguf")[0], artifact

    return make


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("name", "mix"),
    [
        *((name, "Q4_K_M") for name in CASES),
        *((name, mix) for name in ("phi3", "mixtral") for mix in ("Q2_K_M", "Q3_K_L")),
        *(("falcon", mix) for mix in MIXES if mix not in ("Q2_K_S", "Q4_K_M")),
        *(("deepseek-v2", mix) for mix in MIXES if mix not in ("Q2_K_S", "Q4_K_M")),
    ],
)
def test_mixes_are_llamacpps(wide: Callable[..., tuple[Path, Zeros]], tmp_path: Path, name: str, mix: str) -> None:
    """Q2_K_S, which llama.cpp makes with an importance matrix alone, is in tests/test_gguf_plan.py."""
    check_mix(*wide(name), tmp_path, mix)


@pytest.mark.llamacpp
def test_mix_of_qwen2_with_80_blocks_is_llamacpps(wide: Callable[..., tuple[Path, Zeros]], tmp_path: Path) -> None:
    """llama.cpp takes it for one of 70B even where each query has a key of its own, as in Qwen1.5 72B."""
    check_mix(*wide("qwen2", num_hidden_layers=80, num_key_value_heads=4), tmp_path, "Q4_K_S")


def check_mix(source: Path, artifact: Zeros, tmp_path: Path, mix: str) -> None:
    shapes = {key: tuple(facts["shape"]) for key, facts in artifact.manifest().items()}
    planned = plan(f"gguf:{mix}", artifact.config(), shapes)
    llamacpp_quantize(source, tmp_path / "theirs.gguf", {"Q2_K_M": "Q2_K", "Q6_K_M": "Q6_K"}.get(mix, mix), threads=1)
    theirs = GGUFModel(tmp_path / "theirs.gguf")
    assert {tensor.name: tensor.codec for tensor in planned} == {key: theirs.codec(key) for key in theirs.names()}


# The table


def of_case(name: str) -> Architecture:
    config, _ = config_and_shapes(name)
    found = find_architecture(config)
    assert found is not None
    return found


def test_every_architecture_of_the_table_has_a_case() -> None:
    tested = [of_case(name).family for name in CASES]
    assert set(tested) == {entry.family for entry in ARCHITECTURES if entry.gguf and not entry.encoder}


def test_docs_show_the_table(root: Path, load_script: Callable[[str], ModuleType]) -> None:
    cases: dict[str, list[str]] = {}
    for name in CASES:
        cases.setdefault(of_case(name).family, []).append(name)
    assert load_script("tools/models_table.py").table(cases) in (root / "docs/models.md").read_text()
