"""Compares the shapes of a file's tensors with its metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning
from lqexport.errors import listed

INSIDE = re.compile(r"^blk\.\d+\.")
Sizes = dict[str, set[tuple[int, ...]]]


def check_shapes(file: OpenFile) -> Iterator[Problem]:
    """Yields the tensors whose shape is not the one that the metadata gives.

    A tensor whose shape the metadata does not give as one number, or of an attention with latent keys or with heads of
    two sizes, is not compared.
    In an architecture of which we have no entry, another shape is a warning.
    """
    expected = _expected(file)
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(min(shapes))}"
        for name, tensor in file.tensors.items()
        if (shapes := expected.get(INSIDE.sub("", name))) and _squeezed(tensor.shape) not in shapes
    ]
    if wrong:
        sentence = f"{len(wrong)} tensors have another shape than the metadata says: {listed(wrong, 3)}."
        yield error("shapes", sentence) if file.entries else warning("shapes", sentence)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without leading ones: a matrix of one row may be a vector."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def _expected(file: OpenFile) -> Sizes:
    """Returns a tensor's name within its block -> the shapes that it may have, where the metadata has all numbers."""
    hidden, experts = file.count("embedding_length"), file.count("expert_count")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if isinstance(tokens, list) and tokens else file.count("vocab_size")
    table: dict[str, list[tuple[int | None, ...]]] = {
        "token_embd.weight": [(vocabulary, hidden)],
        "output.weight": [(vocabulary, hidden)],
        "ffn_gate_inp.weight": [(experts, hidden)],
    }
    table |= {f"{name}.weight": [(hidden,)] for name in ("output_norm", "attn_norm", "ffn_norm", "ffn_post_norm")}
    table |= _attention(file, hidden) | _feed_forward(file, hidden) | _experts(file, hidden, experts)
    return {
        name: {tuple(size for size in shape if size is not None) for shape in shapes}
        for name, shapes in table.items()
        if all(None not in shape for shape in shapes)
    }


def _attention(file: OpenFile, hidden: int | None) -> dict[str, list[tuple[int | None, ...]]]:
    heads, keys = file.count("attention.head_count"), file.get("attention.head_count_kv") or None
    keys = heads if keys is None else file.count("attention.head_count_kv")
    several_sizes = file.get("attention.key_length_swa") is not None or any(entry.latent for entry in file.entries)
    if not file.entries or several_sizes or hidden is None or heads is None:
        return {}
    width = file.count("attention.key_length") or hidden // heads
    value_width = file.count("attention.value_length") or width
    queries, outputs = heads * width, heads * value_width
    rows = {"attn_q": queries, "attn_k": keys and keys * width, "attn_v": keys and keys * value_width}
    rows["attn_qkv"] = keys and queries + keys * (width + value_width)
    if any(entry.gated for entry in file.entries):
        rows |= {"attn_q": 2 * queries, "attn_qkv": None}  # the latter is of blocks with another attention
    table: dict[str, list[tuple[int | None, ...]]] = {f"{name}.weight": [(size, hidden)] for name, size in rows.items()}
    table |= {f"{name}.bias": [(size,)] for name, size in rows.items()}
    return table | {"attn_output.weight": [(hidden, outputs)]}


def _feed_forward(file: OpenFile, hidden: int | None) -> dict[str, list[tuple[int | None, ...]]]:
    width = file.count("feed_forward_length")
    fused = 2 * width if width and not any(name.endswith("ffn_gate.weight") for name in file.tensors) else width
    return {
        "ffn_gate.weight": [(width, hidden)],
        "ffn_up.weight": [(width, hidden), (fused, hidden)],
        "ffn_down.weight": [(hidden, width)],
    }


def _experts(file: OpenFile, hidden: int | None, experts: int | None) -> dict[str, list[tuple[int | None, ...]]]:
    width = file.count("expert_feed_forward_length") or file.count("feed_forward_length")
    inputs = file.count("moe_latent_size") or hidden
    return {
        "ffn_gate_exps.weight": [(experts, width, inputs)],
        "ffn_up_exps.weight": [(experts, width, inputs)],
        "ffn_down_exps.weight": [(experts, inputs, width)],
    }
