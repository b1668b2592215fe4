"""Architectures: EXAONE."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.models.families.olmo import OLMO2

EXAONE4 = replace(
    OLMO2,
    family="EXAONE 4.0 1.2B",
    classes=("Exaone4ForCausalLM",),
    model_type="exaone4",
    gguf="exaone4",
    # With windows, only the blocks that have them are rotated. llama.cpp does that only in models of 64 blocks.
    fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    rope_types=("default", "dynamic", "llama3"),
    period=1,
    square_heads=True,
)
