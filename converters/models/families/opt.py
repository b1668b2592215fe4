"""Architectures: OPT."""

from __future__ import annotations

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.families.parts import QKV

OPT = Architecture(
    family="OPT",
    classes=("OPTForCausalLM",),
    model_type="opt",
    gguf=None,
    adds=False,  # in the model of 350 million weights, norms come after the sums
    linears=(QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    # llama.cpp does not run OPT. The GGUF names only give the modules' roles and the order of the tensors.
    gguf_block={
        "self_attn_layer_norm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_output",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn_up",
        "fc2": "ffn_down",
    },
    gguf_top={
        "model.decoder.embed_tokens.weight": "token_embd.weight",
        "model.decoder.embed_positions.weight": "position_embd.weight",
        "model.decoder.final_layer_norm.weight": "output_norm.weight",
        "model.decoder.final_layer_norm.bias": "output_norm.bias",
        "lm_head.weight": "output.weight",
    },
    renamed={r"^decoder\.": "model.decoder."},
    aliases={"ffn_dim": "intermediate_size"},
    rope_types=(),
    free_heads=False,
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens.weight",
    final_norm="model.decoder.final_layer_norm",
)
