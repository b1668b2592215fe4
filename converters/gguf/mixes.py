"""Which GGUF type each tensor gets: pure types, llama.cpp's mixes, and its fallbacks for awkward shapes.

The rules are those of llama.cpp's `src/llama-quant.cpp` (`llama_tensor_get_type_impl`, `tensor_type_fallback`); tests
compare them with llama.cpp's own quantizer, for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguf import LlamaFileType

MIXES = {
    "Q2_K_M": "Q2_K",
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K_M": "Q6_K",
}
"""Mix -> the type of most of its tensors. Named as llama.cpp names them, except `Q2_K_M` and `Q6_K_M`: its mixes
`Q2_K` and `Q6_K`, whose names are those of pure types here."""

FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""A type of blocks of 256 -> the type of blocks of 32 that llama.cpp takes where 256 does not divide the columns."""


@dataclass(frozen=True)
class Layer:
    """Where a tensor stands.

    architecture     llama.cpp's name of it
    index, count     number of its decoder block, and how many there are
    queries_per_key  query heads that share one key head
    experts          of each block, 0 where there are none
    """

    architecture: str
    index: int
    count: int
    queries_per_key: int
    experts: int = 0

    @property
    def favoured(self) -> bool:
        """llama.cpp's `use_more_bits`: the first and last eighth, and every third block between."""
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2

    @property
    def large(self) -> bool:
        """Whether llama.cpp takes the model for one of 70B, by its blocks: Llama 2 and 3 and Qwen. Their value
        projections are an eighth of the query's, so more bits cost little."""
        grouped = self.architecture == "llama" and self.queries_per_key > 1
        return self.count == 80 and (grouped or self.architecture == "qwen2")


Rule = Callable[[Layer], str | None]
"""The type of a tensor, None for the mix's most frequent one."""

_RULES: dict[str, dict[str, Rule]] = {
    "Q2_K_M": {
        "attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else "Q3_K",
        "attn_output": lambda layer: "Q3_K",
        "ffn_down": lambda layer: "Q3_K",
    },
    "Q2_K_S": {
        "attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else None,
        "ffn_down": lambda layer: "Q4_K" if layer.index < layer.count // 8 else None,
    },
    "Q3_K_M": {
        "attn_v": lambda layer: "Q5_K" if layer.index < 2 else "Q4_K",
        "attn_output": lambda layer: "Q4_K",
        "ffn_down": lambda layer: "Q5_K" if layer.index < layer.count // 16 else "Q4_K",
    },
    "Q3_K_L": {
        "attn_v": lambda layer: "Q5_K",
        "attn_output": lambda layer: "Q5_K",
        "ffn_down": lambda layer: "Q5_K",
    },
    "Q4_K_S": {
        "attn_v": lambda layer: "Q5_K" if layer.index < 4 else None,
        "ffn_down": lambda layer: "Q5_K" if layer.index < layer.count // 8 else None,
    },
    "Q4_K_M": {
        "attn_v": lambda layer: "Q6_K" if layer.favoured else None,
        "ffn_down": lambda layer: "Q6_K" if layer.favoured else None,
    },
    "Q5_K_M": {
        "attn_v": lambda layer: "Q6_K" if layer.favoured else None,
        "ffn_down": lambda layer: "Q6_K" if layer.favoured else None,
    },
}

_FALCON: dict[str, dict[str, Rule]] = {
    "Q2_K_M": {"attn_output": lambda layer: None},
    "Q3_K_M": {
        "attn_output": lambda layer: None,
        "ffn_down": lambda layer: "Q5_K" if layer.index < layer.count // 16 else "Q4_K" if layer.favoured else None,
    },
    "Q3_K_L": {"attn_output": lambda layer: "Q4_K", "ffn_down": lambda layer: "Q4_K"},
    "Q4_K_S": {"ffn_down": lambda layer: None},
    "Q4_K_M": {
        "ffn_down": lambda layer: "Q6_K" if layer.index < layer.count // 16 else "Q5_K" if layer.favoured else None
    },
}
"""What is otherwise for Falcon."""

_ALIKE = {"attn_qkv": "attn_v", "attn_kv_b": "attn_v", "ffn_down_exps": "ffn_down", "ffn_down_shexp": "ffn_down"}
"""Fused and stacked matrices -> those by whose rules they go."""


def mix_type(mix: str, module: str, layer: Layer) -> str:
    """Type of a block's linear (by its GGUF module name) in one of `MIXES`, before any fallback."""
    module = _ALIKE.get(module, module)
    if layer.experts == 8 and module in ("attn_k", "attn_v", "attn_output"):
        return _beside_eight_experts(mix, module)
    rules = _RULES.get(mix, {}) | (_FALCON.get(mix, {}) if layer.architecture == "falcon" else {})
    rule = rules.get(module)
    kind = (rule(layer) if rule else None) or MIXES[mix]
    return "Q5_K" if module == "attn_v" and layer.large and kind in ("Q3_K", "Q4_K") else kind


def _beside_eight_experts(mix: str, module: str) -> str:
    """Attention is so small a part of such models that more bits cost little."""
    if module == "attn_output":
        return "Q5_K" if mix in ("Q2_K_M", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else MIXES[mix]
    return "Q8_0"


def mix_output(architecture: str, columns: int) -> str:
    """Type of the output, and of an embedding tied to it, in every one of `MIXES`."""
    return "Q6_K" if columns % 256 == 0 and architecture != "falcon" else "Q8_0"


def file_type(kind: str) -> int:
    """`general.file_type` (llama_ftype) of a pure type or mix. A pure K type has its S mix's number, as
    `llama-quantize --pure` writes it."""
    renamed = {"F32": "ALL_F32", "Q2_K_M": "MOSTLY_Q2_K", "Q6_K_M": "MOSTLY_Q6_K"}
    renamed |= {pure: f"MOSTLY_{pure}_S" for pure in ("Q3_K", "Q4_K", "Q5_K")}
    return int(LlamaFileType[renamed.get(kind, f"MOSTLY_{kind}")])


def fallback_type(kind: str, columns: int) -> str:
    """The type that holds `columns` in place of `kind`, whose blocks do not divide them.

    llama.cpp stops where a type of blocks of 32 does not fit; F16 is what it takes where a fallback does not fit.
    """
    return FALLBACKS[kind] if kind in FALLBACKS and columns % 32 == 0 else "F16"
