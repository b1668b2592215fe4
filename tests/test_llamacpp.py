"""llama.cpp compared with transformers on a tiny random Llama; its quantizer, and importance matrices."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lqexport.converters.gguf.imatrix import write_imatrix
from lqexport.errors import UserError
from lqexport.evaluation import llamacpp
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.evaluation.llamacpp_quantizer import quantize

VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS, FEED_FORWARD = 96, 256, 4, 2, 2, 512
MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.06)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns the rows of q or k in llama.cpp's order, in which rotary pairs are neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    state = dict(model.named_parameters())
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        for ours, theirs in MODULES.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight if heads is None else interleaved(weight, heads)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def write_gguf(path: Path, model: LlamaForCausalLM, dtype: torch.dtype) -> Path:
    """Writes the model without a tokenizer, with matrices in `dtype`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCABULARY)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("none")
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.to(dtype if tensor.ndim == 2 else torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def f32(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "f32.gguf", model, torch.float32)


def transformers_logits(model: LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 64).tolist()


@pytest.mark.llamacpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_agree_with_transformers(model: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = transformers_logits(model, TOKENS)
    with LlamaCpp(write_gguf(tmp_path / "tiny.gguf", model, dtype), n_ctx=64, threads=1) as engine:
        assert engine.n_vocab == VOCABULARY
        logits = engine.logits(TOKENS)
    assert logits.dtype == np.float32
    assert logits.shape == (64, VOCABULARY)
    # llama.cpp keeps keys and values in float16; logits have a standard deviation of about 1.
    assert expected.std() > 0.5
    assert np.abs(logits - expected).mean() < 2e-3


@pytest.mark.llamacpp
def test_signs_of_life_while_loading_and_running(f32: Path) -> None:
    signs: list[None] = []
    with LlamaCpp(f32, n_ctx=64, threads=1, alive=lambda: signs.append(None)) as engine:
        loading = len(signs)
        engine.logits(TOKENS)
    assert 0 < loading < len(signs) - 10


@pytest.mark.llamacpp
def test_windows_do_not_see_each_other(f32: Path) -> None:
    with LlamaCpp(f32, n_ctx=64, threads=1) as engine:
        before = engine.logits(TOKENS)
        engine.logits(TOKENS[::-1])
        assert np.array_equal(engine.logits(TOKENS), before)
        assert np.array_equal(engine.logits(TOKENS, first=40), before[40:])


@pytest.mark.llamacpp
@pytest.mark.parametrize("tokens", [[], [0] * 65, [VOCABULARY], [-1]])
def test_tokens_out_of_range_are_refused(f32: Path, tokens: list[int]) -> None:
    with LlamaCpp(f32, n_ctx=64, threads=1) as engine, pytest.raises(UserError, match="1 to 64 tokens"):
        engine.logits(tokens)


@pytest.mark.llamacpp
def test_a_file_without_tokenizer_says_so(f32: Path) -> None:
    with LlamaCpp(f32, n_ctx=64, threads=1) as engine, pytest.raises(UserError, match="no tokenizer"):
        engine.tokenize("text")


@pytest.mark.llamacpp
def test_load_failure_gives_llamacpps_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(UserError, match=r"cannot load .*not\.gguf.*invalid magic"):
        LlamaCpp(path, n_ctx=64)
    assert capfd.readouterr().err == ""


@pytest.mark.llamacpp
def test_a_truncated_file_is_refused(f32: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(f32.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"llama\.cpp says"):
        LlamaCpp(path, n_ctx=64)


def test_missing_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "library", lambda: (None, llamacpp._Log()))
    with pytest.raises(UserError, match="There is no file"):
        LlamaCpp(tmp_path / "absent.gguf", n_ctx=64)


@pytest.fixture
def without_cache() -> Any:
    llamacpp.library.cache_clear()
    yield
    llamacpp.library.cache_clear()


@pytest.mark.usefixtures("without_cache")
def test_missing_wheel_names_the_extra(f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[llamacpp\]'"):
        LlamaCpp(f32, n_ctx=64)


@pytest.mark.llamacpp
@pytest.mark.usefixtures("without_cache")
def test_another_struct_layout_is_noticed(f32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure, expected = llamacpp._DEFAULTS["llama_context_default_params"]
    changed = {**llamacpp._DEFAULTS, "llama_context_default_params": (structure, {**expected, "n_batch": 7})}
    monkeypatch.setattr(llamacpp, "_DEFAULTS", changed)
    with pytest.raises(UserError, match="n_batch is 2048, not 7, so this is another version"):
        LlamaCpp(f32, n_ctx=64)


@pytest.mark.llamacpp
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "Q2_K"])
def test_quantizer_writes_files_that_load(f32: Path, tmp_path: Path, file_type: str) -> None:
    out = tmp_path / "out.gguf"
    quantize(f32, out, file_type, pure=True, token_embedding="Q8_0", output="Q6_K", threads=1)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["output.weight"] == "Q6_K"
    assert types["blk.1.ffn_down.weight"] == {"Q4_K_M": "Q4_K"}.get(file_type, file_type)
    with LlamaCpp(out, n_ctx=64, threads=1) as engine:
        assert np.isfinite(engine.logits(TOKENS)).all()


@pytest.mark.llamacpp
def test_quantizer_to_f32_gives_the_decoded_values(f32: Path, tmp_path: Path) -> None:
    quantize(f32, tmp_path / "q.gguf", "Q8_0", threads=1)
    with pytest.raises(UserError, match="requantizing"):
        quantize(tmp_path / "q.gguf", tmp_path / "back.gguf", "F32", threads=1)
    quantize(tmp_path / "q.gguf", tmp_path / "back.gguf", "F32", requantize=True, threads=1)
    packed = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "back.gguf").tensors:
        source = packed[tensor.name]
        expected = gguf.dequantize(source.data, source.tensor_type)
        assert np.array_equal(tensor.data.reshape(expected.shape), expected), tensor.name


@pytest.mark.llamacpp
def test_refused_quantization_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file type 'Q9'"):
        quantize(tmp_path / "absent.gguf", tmp_path / "out.gguf", "Q9")
    with pytest.raises(UserError, match="cannot quantize"):
        quantize(tmp_path / "absent.gguf", tmp_path / "out.gguf", "Q4_0", threads=1)
    with pytest.raises(UserError, match="no tensor type 'Q9'"):
        quantize(tmp_path / "absent.gguf", tmp_path / "out.gguf", "Q4_0", output="Q9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.llamacpp
@pytest.mark.parametrize("as_file", [True, False])
def test_quantizer_follows_the_imatrix(f32: Path, tmp_path: Path, as_file: bool) -> None:
    """The column that the importance matrix calls important must be much more exact than without the matrix."""
    name = "blk.0.ffn_up.weight"
    means = np.where(np.arange(HIDDEN) == 0, 1000.0, 0.01).astype(np.float32)
    squares = np.append(np.float32(64), 64 * means)[None]
    write_imatrix(tmp_path / "i.gguf", {name: squares}, dataset="test", chunks=1, chunk_size=64)
    imatrix = tmp_path / "i.gguf" if as_file else {name: means}
    errors = []
    for matrix in (None, imatrix):
        quantize(f32, tmp_path / "q.gguf", "Q4_0", imatrix=matrix, pure=True, threads=1)
        (tensor,) = (tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors if tensor.name == name)
        (source,) = (tensor for tensor in gguf.GGUFReader(f32).tensors if tensor.name == name)
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
        errors.append(float(np.square(decoded - source.data)[:, 0].mean()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.llamacpp
def test_an_imatrix_of_another_model_is_refused(f32: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="imatrix size"):
        quantize(f32, tmp_path / "q.gguf", "Q4_0", imatrix={"blk.0.ffn_up.weight": np.ones(3, np.float32)}, threads=1)
    assert list(tmp_path.iterdir()) == []
