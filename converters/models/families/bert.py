"""Architectures: BERT, an encoder of sentences."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.architecture import Architecture, Key
from lqexport.converters.models.families.parts import LAYER_NORM, POOLING

BERT = Architecture(
    family="BERT (encoders of sentences)",
    classes=("BertModel",),
    model_type="bert",
    gguf="bert",
    encoder=True,
    adds=False,
    linears=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    # A norm follows the linear after which it is listed: it is applied to the linear's output plus the residual.
    gguf_block={
        "attention.self.query": "attn_q",
        "attention.self.key": "attn_k",
        "attention.self.value": "attn_v",
        "attention.output.dense": "attn_output",
        "attention.output.LayerNorm": "attn_output_norm",
        "intermediate.dense": "ffn_up",
        "output.dense": "ffn_down",
        "output.LayerNorm": "layer_output_norm",
    },
    gguf_top={
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.position_embeddings.weight": "position_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "embeddings.LayerNorm.weight": "token_embd_norm.weight",
        "embeddings.LayerNorm.bias": "token_embd_norm.bias",
        "pooler.dense.weight": "cls.weight",
        "pooler.dense.bias": "cls.bias",
    },
    unused=(r"position_ids$",),
    keys=(
        replace(LAYER_NORM, default=1e-12),
        Key("attention.causal", "is_decoder", bool, False),
        POOLING,
    ),
    fixed={"hidden_act": ("gelu",), "is_decoder": (False,), "position_embedding_type": ("absolute",)},
    # There is no output layer; a tied output is the way to say that none is missing.
    derived=lambda config: {"tie_word_embeddings": True},
    rope_types=(),
    free_heads=False,
    blocks="encoder.layer",
    embedding="embeddings.word_embeddings.weight",
    # The only module after the last block. The text's embedding does not go through it.
    final_norm="pooler.dense",
)
