"""A table of ways to make a wrong file of a right one, over several families of models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFValueType
from rewritten_files import Content, Spoil
from spoiled_files import Change
from torch import Tensor

BLOCK = "model.layers.1."
DOWN, UP, GATE = (f"{BLOCK}mlp.{name}_proj.weight" for name in ("down", "up", "gate"))
Q, K, V, OUT = (f"{BLOCK}self_attn.{name}_proj.weight" for name in "qkvo")
NORM = f"{BLOCK}input_layernorm.weight"
TOKENS = "tokenizer.ggml."


@dataclass(frozen=True)
class Wrong:
    """A wrong file.

    family    the model, one of `spoiled_files.CLASSES`
    target    the type of its matrices
    said      a part of what `verify` says of it
    change    what is done to the source's tensors before they are rounded
    spoil     what is done to the written file
    bytes     what is done to the bytes of the file
    """

    family: str
    target: str
    said: str
    change: Change | None = None
    spoil: Spoil | None = None
    bytes: Callable[[Path], None] | None = None


def scaled(name: str, factor: float) -> Change:
    return lambda tensors: tensors.update({name: factor * tensors[name]})


def rolled(name: str, axis: int = 0, by: int = 1) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].roll(by, axis)})


def swapped(one: str, other: str) -> Change:
    return lambda tensors: tensors.update({one: tensors[other], other: tensors[one]})


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def in_ropes_other_order(rows: Tensor) -> Tensor:
    """Returns the rows of 4 heads as llama.cpp's rope has them, where they should be as Hugging Face's."""
    count, *columns = rows.shape
    return rows.reshape(4, 2, count // 8, *columns).transpose(1, 2).reshape(rows.shape)


def heads_turned(rows: Tensor) -> Tensor:
    """Returns the rows with the 4 heads in reverse order."""
    return rows.reshape(4, -1, *rows.shape[1:]).flip(0).reshape(rows.shape)


def zero_row(rows: Tensor) -> Tensor:
    return torch.where(torch.arange(len(rows))[:, None] == 5, 0.0, rows)


def turned_experts(tensors: dict[str, Tensor]) -> None:
    """Puts the experts of a block in another order than the router has them."""
    for name in ("gate", "up", "down"):
        names = [f"{BLOCK}mlp.experts.{number}.{name}_proj.weight" for number in range(4)]
        for this, value in zip(names, [tensors[other] for other in names[1:] + names[:1]], strict=True):
            tensors[this] = value


def key(name: str, value: Any) -> Spoil:
    return lambda content: content.values.update({name: value})


def factor(name: str, by: float) -> Spoil:
    return lambda content: content.values.update({name: by * content.values[name]})


def without(*names: str) -> Spoil:
    def spoil(content: Content) -> None:
        for name in names:
            content.values.pop(name, None)
            content.tensors.pop(name, None)

    return spoil


def text(name: str, value: str) -> Spoil:
    return lambda content: content.add(name, value, GGUFValueType.STRING)


def number(name: str, value: int) -> Spoil:
    return lambda content: content.add(name, value, GGUFValueType.UINT32)


def block_scale(name: str, by: float, row: int = 3) -> Spoil:
    """Multiplies the float16 scale of one block of Q8_0 or Q4_0."""

    def spoil(content: Content) -> None:
        scale = content.tensors[name][row, :2].view(np.float16)
        scale *= np.float16(by)

    return spoil


def exponents(name: str, blocks: slice) -> Spoil:
    """Doubles the scales of blocks of MXFP4."""

    def spoil(content: Content) -> None:
        content.tensors[name].reshape(-1, 17)[blocks, 0] += 1

    return spoil


def nibbles_turned(name: str) -> Spoil:
    """Exchanges the halves of every byte of codes of Q4_0."""

    def spoil(content: Content) -> None:
        blocks = content.tensors[name].reshape(-1, 18)
        blocks[:, 2:] = blocks[:, 2:] << 4 | blocks[:, 2:] >> 4

    return spoil


def each(name: str, change: Callable[[list[Any]], list[Any]]) -> Spoil:
    return lambda content: content.values.update({name: change(content.values[name])})


def tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return lambda content: content.tensors.update({name: np.ascontiguousarray(change(content.tensors[name]))})


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3000])


def shifted_data(path: Path) -> None:
    """Puts 32 bytes before the data of the tensors, so that each is read from a block too early."""
    content = path.read_bytes()
    begin = len(content) - len(content) // 2 // 32 * 32
    path.write_bytes(content[:begin] + bytes(32) + content[begin:-32])


ORDER, PLACE = "in another order", "holds what the source has as"
EPSILON, BASE = "attention.layer_norm_rms_epsilon", "rope.freq_base"
LAST = "model.norm.weight"
NOT_FOUND = "tensors are missing"

WRONG: dict[str, Wrong] = {
    # Settings.
    "epsilon x1000, F16": Wrong("llama", "F16", "rms_norm_eps 0.001", spoil=key(f"llama.{EPSILON}", 1e-3)),
    "epsilon x1000, Q4_0": Wrong("llama", "Q4_0", "rms_norm_eps 0.001", spoil=key(f"llama.{EPSILON}", 1e-3)),
    "epsilon 0.1": Wrong("qwen3", "Q8_0", "rms_norm_eps 0.1", spoil=key(f"qwen3.{EPSILON}", 0.1)),
    "rope base 1 % off": Wrong("llama", "Q8_0", "rope_theta 10100", spoil=factor(f"llama.{BASE}", 1.01)),
    "rope base 5 % off": Wrong("llama", "F16", "rope_theta 10500", spoil=factor(f"llama.{BASE}", 1.05)),
    "rope base left out": Wrong("qwen3", "Q4_0", "rope_theta 10000", spoil=without(f"qwen3.{BASE}")),
    "rope factors left out": Wrong("llama3", "Q8_0", "rope_type", spoil=without("rope_freqs.weight")),
    "rope factors in another order": Wrong(
        "llama3", "Q8_0", "rope_freqs", spoil=tensor("rope_freqs.weight", lambda values: values[::-1]),
    ),
    "rope factor halved": Wrong("gemma3", "Q8_0", "factor 4", spoil=factor("gemma3.rope.scaling.factor", 0.5)),
    "rope scaling left out": Wrong(
        "gemma3", "Q8_0", "rope_type default", spoil=without("gemma3.rope.scaling.factor", "gemma3.rope.scaling.type"),
    ),
    "rope base of windows off": Wrong(
        "gemma3", "F16", "rope_theta 20000", spoil=factor("gemma3.rope.freq_base_swa", 2),
    ),
    "yarn multiplier left out": Wrong(
        "deepseek", "Q8_0", "mscale", spoil=without("deepseek2.rope.scaling.yarn_log_multiplier"),
    ),
    "yarn factor off": Wrong("deepseek", "Q4_0", "factor 4", spoil=factor("deepseek2.rope.scaling.factor", 0.5)),
    "window halved": Wrong(
        "gemma2", "F16", "sliding_window 32", spoil=key("gemma2.attention.sliding_window", 32),
    ),
    "window off by one": Wrong(
        "gemma3", "Q4_0", "sliding_window 65", spoil=key("gemma3.attention.sliding_window", 65),
    ),
    "windows in other blocks": Wrong(
        "gemma3", "Q8_0", "layer_types", spoil=key("gemma3.attention.sliding_window_pattern", 2),
    ),
    "cap on attention off": Wrong(
        "gemma2", "Q8_0", "attn_logit_softcapping 30", spoil=key("gemma2.attn_logit_softcapping", 30.0),
    ),
    "cap on the output off": Wrong(
        "gemma2", "Q4_0", "final_logit_softcapping 20", spoil=key("gemma2.final_logit_softcapping", 20.0),
    ),
    "one expert a token": Wrong("qwen3moe", "Q8_0", "per_tok 1", spoil=key("qwen3moe.expert_used_count", 1)),
    "experts' scale off": Wrong(
        "deepseek", "Q8_0", "routed_scaling_factor 1", spoil=key("deepseek2.expert_weights_scale", 1.0),
    ),
    "experts chosen by another function": Wrong(
        "deepseek", "Q8_0", "expert_gating_func 2", spoil=key("deepseek2.expert_gating_func", 2),
    ),
    "yarn from another context": Wrong(
        "deepseek", "Q4_0", "original_max_position_embeddings 32",
        spoil=key("deepseek2.rope.scaling.original_context_length", 32),
    ),
    "rank of queries": Wrong(
        "deepseek", "Q8_0", "attn_q_a.weight is [32, 128], not [16", spoil=key("deepseek2.attention.q_lora_rank", 16),
    ),
    "rank of keys": Wrong(
        "deepseek", "Q4_0", "attn_kv_a_mqa.weight is [80, 128], not [48",
        spoil=key("deepseek2.attention.kv_lora_rank", 32),
    ),
    "key heads": Wrong("llama", "Q8_0", "shape", spoil=key("llama.attention.head_count_kv", 4)),
    "context halved": Wrong(
        "llama", "Q8_0", "max_position_embeddings 256", spoil=key("llama.context_length", 256),
    ),
    # Weights in the wrong place.
    "gate and up swapped, F16": Wrong("llama", "F16", PLACE, swapped(GATE, UP)),
    "gate and up swapped, Q8_0": Wrong("gemma3", "Q8_0", PLACE, swapped(GATE, UP)),
    "gate and up swapped, Q4_0": Wrong("qwen3", "Q4_0", PLACE, swapped(GATE, UP)),
    "keys and values swapped": Wrong("qwen2", "Q8_0", PLACE, swapped(K, V)),
    "blocks swapped": Wrong("llama", "Q8_0", "down_proj", swapped(DOWN, DOWN.replace(".1.", ".2."))),
    "head norms swapped": Wrong(
        "qwen3", "Q4_0", "norm", swapped(f"{BLOCK}self_attn.q_norm.weight", f"{BLOCK}self_attn.k_norm.weight"),
    ),
    "norms of a block swapped": Wrong(
        "llama", "Q8_0", "norm", swapped(NORM, f"{BLOCK}post_attention_layernorm.weight"),
    ),
    "query rows in rope's other order, Q8_0": Wrong("llama", "Q8_0", ORDER, changed(Q, in_ropes_other_order)),
    "query rows in rope's other order, Q4_0": Wrong("untied", "Q4_0", ORDER, changed(Q, in_ropes_other_order)),
    "query rows in llama.cpp's old order": Wrong("qwen3", "Q8_0", ORDER, changed(Q, in_ropes_other_order)),
    "query heads in another order": Wrong("qwen3", "Q4_0", ORDER, changed(Q, heads_turned)),
    "columns of the output projection by heads": Wrong(
        "llama", "Q4_0", "o_proj", changed(OUT, lambda rows: heads_turned(rows.T).T.contiguous()),
    ),
    "columns shifted": Wrong("gemma2", "Q4_0", "q_proj", rolled(Q, 1)),
    "gains shifted, F16": Wrong("llama", "F16", ORDER, rolled(NORM)),
    "gains shifted, Q8_0": Wrong("gemma2", "Q8_0", ORDER, rolled(NORM)),
    "gains shifted, Q4_0": Wrong("qwen3moe", "Q4_0", ORDER, rolled(NORM)),
    "gains of the last norm shifted": Wrong("deepseek", "Q4_0", ORDER, rolled(LAST)),
    "gains of a head norm shifted": Wrong("qwen3", "Q4_0", ORDER, rolled(f"{BLOCK}self_attn.q_norm.weight")),
    "gains of the latent norm shifted": Wrong(
        "deepseek", "Q8_0", ORDER, rolled(f"{BLOCK}self_attn.kv_a_layernorm.weight"),
    ),
    "gains without the 1 of Gemma": Wrong("gemma3", "Q4_0", "layernorm", changed(NORM, lambda gains: gains - 1)),
    "embedding off by one": Wrong("untied", "Q8_0", ORDER, rolled("model.embed_tokens.weight")),
    "output off by one": Wrong("untied", "Q4_0", "lm_head.weight", rolled("lm_head.weight")),
    "tied for untied": Wrong(
        "untied", "Q8_0", "lm_head.weight",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    ),
    "output left out": Wrong("untied", "Q8_0", f"1 of 30 {NOT_FOUND}: lm_head", spoil=without("output.weight")),
    "experts against the router, Q8_0": Wrong("qwen3moe", "Q8_0", "experts", turned_experts),
    "experts against the router, Q4_0": Wrong("deepseek", "Q4_0", "experts", turned_experts),
    "router off by one": Wrong("qwen3moe", "Q4_0", "mlp.gate.weight", rolled(f"{BLOCK}mlp.gate.weight")),
    "gate and up of an expert swapped": Wrong(
        "qwen3moe", "Q8_0", PLACE,
        swapped(*(f"{BLOCK}mlp.experts.2.{name}_proj.weight" for name in ("gate", "up"))),
    ),
    # Numbers that are off.
    "down_proj 2 % too large, F16": Wrong("llama", "F16", "is 1.02 times", scaled(DOWN, 1.02)),
    "down_proj 2 % too large, Q8_0": Wrong("llama", "Q8_0", "is 1.02 times", scaled(DOWN, 1.02)),
    "down_proj 2 % too large, Q4_0": Wrong("llama", "Q4_0", "is 1.02 times", scaled(DOWN, 1.02)),
    "down_proj 10 % too large": Wrong("qwen3", "Q4_0", "is 1.1 times", scaled(DOWN, 1.1)),
    "q_proj 3 % too small": Wrong("gemma2", "Q4_0", "is 0.97 times", scaled(Q, 0.97)),
    "shared expert 5 % too large": Wrong(
        "deepseek", "Q8_0", "is 1.05 times", scaled(f"{BLOCK}mlp.shared_experts.down_proj.weight", 1.05),
    ),
    "gains 5 % too large": Wrong("llama", "Q4_0", "is 1.05 times", scaled(NORM, 1.05)),
    "a bias is zero, F16": Wrong("qwen2", "F16", "is 0 times", scaled(Q.replace("weight", "bias"), 0)),
    "a bias is zero, Q4_0": Wrong("qwen2", "Q4_0", "is 0 times", scaled(Q.replace("weight", "bias"), 0)),
    "biases left out": Wrong(
        "qwen2", "Q8_0", NOT_FOUND, spoil=without(*(f"blk.{i}.attn_{name}.bias" for i in range(3) for name in "qkv")),
    ),
    "a row is zero": Wrong("llama", "Q4_0", "v_proj", changed(V, zero_row)),
    "an expert is zero": Wrong("deepseek", "Q4_0", "is 0 times", scaled(f"{BLOCK}mlp.experts.3.up_proj.weight", 0)),
    "one block's scale 2 % off, Q8_0": Wrong(
        "llama", "Q8_0", "1 of 1024 blocks", spoil=block_scale("blk.1.ffn_down.weight", 1.02),
    ),
    "one block's scale 2 % off, Q4_0": Wrong(
        "qwen3", "Q4_0", "1 of 1024 blocks", spoil=block_scale("blk.1.ffn_down.weight", 1.02),
    ),
    "one block's scale doubled": Wrong(
        "gemma2", "Q8_0", "1 of 1024 blocks", spoil=block_scale("blk.1.ffn_up.weight", 2),
    ),
    "one block's scale x64": Wrong("qwen2", "Q8_0", "1 of 1024 blocks", spoil=block_scale("blk.1.ffn_up.weight", 64)),
    "one block's sign": Wrong("llama3", "Q4_0", "1 of 512 blocks", spoil=block_scale("blk.0.attn_q.weight", -1)),
    "one block's scale is NaN": Wrong(
        "llama", "Q8_0", "not finite", spoil=block_scale("blk.1.ffn_up.weight", float("nan")),
    ),
    "one exponent of MXFP4 off": Wrong(
        "qwen3moe", "MXFP4", "1 of 512 blocks", spoil=exponents("blk.0.attn_q.weight", slice(5, 6)),
    ),
    "exponents of MXFP4 off": Wrong(
        "llama", "MXFP4", "is 2 times", spoil=exponents("blk.1.ffn_down.weight", slice(None)),
    ),
    "halves of bytes exchanged": Wrong("llama", "Q4_0", "down_proj", spoil=nibbles_turned("blk.1.ffn_down.weight")),
    # The file.
    "cut short": Wrong("llama", "Q4_0", "truncated", bytes=cut_short),
    "data shifted": Wrong("llama", "Q4_0", "", bytes=shifted_data),
    "block left out": Wrong("llama", "Q4_0", "blk.2", spoil=key("llama.block_count", 2)),
    "number of experts left out": Wrong(
        "qwen3moe", "MXFP4", "gives no qwen3moe.expert_count", spoil=without("qwen3moe.expert_count"),
    ),
    # The vocabulary and the chat.
    "no tokenizer": Wrong(
        "llama", "Q8_0", "has no tokenizer",
        spoil=lambda content: [content.values.pop(name) for name in [*content.values] if name.startswith("token")],
    ),
    "token twice": Wrong(
        "llama", "Q8_0", "have the same text", spoil=each(f"{TOKENS}tokens", lambda v: [*v[:-1], v[4]]),
    ),
    "merges turned": Wrong("gemma2", "Q8_0", "merges", spoil=each(f"{TOKENS}merges", lambda v: v[::-1])),
    "merges left out": Wrong("llama", "Q4_0", "merges", spoil=each(f"{TOKENS}merges", lambda v: v[:100])),
    "chat template": Wrong(
        "chat", "Q4_0", "template", spoil=each("tokenizer.chat_template", lambda v: v.replace("assistant", "model")),
    ),
    "no chat template": Wrong("chat", "Q8_0", "the file has none", spoil=without("tokenizer.chat_template")),
    "end token": Wrong("qwen2", "Q4_0", "ends an answer at", spoil=number(f"{TOKENS}eos_token_id", 65)),
    "vocabulary off by one": Wrong(
        "llama", "Q8_0", "have other texts", spoil=each(f"{TOKENS}tokens", lambda v: [*v[1:], v[0]]),
    ),
    "two tokens exchanged": Wrong(
        "qwen3", "Q4_0", "2 tokens have other texts",
        spoil=each(f"{TOKENS}tokens", lambda v: [*v[:300], v[301], v[300], *v[302:]]),
    ),
    "token types": Wrong(
        "llama", "Q8_0", "special tokens are plain", spoil=each(f"{TOKENS}token_type", lambda v: [1] * len(v)),
    ),
    "begin token": Wrong("llama", "Q4_0", "bos token is 66", spoil=number(f"{TOKENS}bos_token_id", 66)),
    "an end token behind prompts": Wrong(
        "llama", "Q4_0", "EOS behind", spoil=key(f"{TOKENS}add_eos_token", True),
    ),
    "splitter": Wrong("llama", "Q4_0", "pre", spoil=text(f"{TOKENS}pre", "qwen2")),
}  # fmt: skip
"""Name -> a wrong file, over Llama, Qwen 2 and 3, Gemma 2 and 3, a mixture of experts and DeepSeek V2."""
