"""One entry per model architecture: how its decoder blocks are built and what its tensors are called.

A new architecture is one `Architecture` in `ARCHITECTURES`; the pipeline, the planner and the converters read only
this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lqexport.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """What the rest of the program needs to know of a family of models.

    classes   names in `architectures` of config.json
    gguf      `general.architecture` of llama.cpp
    blocks    prefix of the decoder blocks' tensors in Hugging Face files
    linears   quantized linears of a block, in groups that share their input, in the order in which data flows
    gguf_block   Hugging Face module of a block -> GGUF name of the same module
    gguf_top     Hugging Face tensor outside the blocks -> GGUF tensor
    rope_permuted   linear -> config key of the head count by which llama.cpp interleaves its rows
    """

    classes: tuple[str, ...]
    gguf: str
    linears: tuple[tuple[str, ...], ...]
    gguf_block: dict[str, str]
    gguf_top: dict[str, str]
    rope_permuted: dict[str, str] = field(default_factory=dict)
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    output: str = "lm_head.weight"


LLAMA = Architecture(
    classes=("LlamaForCausalLM", "MistralForCausalLM"),
    gguf="llama",
    linears=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    gguf_block={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    gguf_top={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    rope_permuted={"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"},
)

ARCHITECTURES = (LLAMA,)


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The entry for a config.json. Raises UserError where it names an architecture that is not in the table."""
    names = config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if any(name in architecture.classes for name in names):
            return architecture
    known = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    raise UserError(f"Unknown architecture {', '.join(map(str, names)) or '(config.json names none)'}. Known: {known}.")
