"""llama.cpp's rules for the GGUF type of each tensor: its mixes, and its fallbacks for shapes that do not fit a type.

The rules are those of llama.cpp's `src/llama-quant.cpp` (`llama_tensor_get_type_impl`, `tensor_type_fallback`). Tests
compare them with llama.cpp's own quantizer, for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguf import LlamaFileType

from lqexport.target import Target

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
    "IQ1_S_MIX": "IQ1_S",
    "IQ1_M_MIX": "IQ1_M",
    "IQ2_XXS_MIX": "IQ2_XXS",
    "IQ2_XS_MIX": "IQ2_XS",
    "IQ2_S_MIX": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XXS_MIX": "IQ3_XXS",
    "IQ3_XS": "IQ3_S",
    "IQ3_S_MIX": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "IQ4_XS_MIX": "IQ4_XS",
    "IQ4_NL_MIX": "IQ4_NL",
    "TQ1_0_MIX": "TQ1_0",
    "TQ2_0_MIX": "TQ2_0",
    "MXFP4_MOE": "Q8_0",
}
"""Mix -> the type of most of its tensors.

The names are llama.cpp's, except where llama.cpp calls a mix as a type, which is the name of the pure type here. Such a
mix is `Q2_K_M`, `Q6_K_M`, or the name with `_MIX`. Where llama.cpp's rules ask whether there is an importance matrix,
there is one."""

LLAMA_NAMES = {f"Q{bits}_K": f"Q{bits}_K_M" for bits in range(2, 7)}
LLAMA_NAMES |= {mix.removesuffix("_MIX"): mix for mix in MIXES if mix.endswith("_MIX")}
"""Type -> the mix that llama.cpp's quantizer calls by the name of the type."""
MEASURED = {"Q2_K": ", which is smaller and better by default (docs/quality.md)"}
"""Type -> how the mix of that name compares with it, where both were measured."""

SMALLEST = ("IQ1_S_MIX", "IQ1_M_MIX", "IQ2_XXS_MIX", "IQ2_XS_MIX", "IQ2_S_MIX", "IQ2_M")
"""The mixes of less than 3 bits, which have rules of their own."""

FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0"), "Q4_0"),
    "NVFP4": "MXFP4",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Type with blocks of 256 -> the type with blocks of 32 that llama.cpp takes if 256 does not divide the columns.

For NVFP4, with blocks of 64, and Q1_0, with blocks of 128, llama.cpp has none."""


def other_meaning(target: Target) -> list[str]:
    """Returns a sentence if a target is a type whose name means a mix to users of llama.cpp; else []."""
    if target.family != "gguf" or target.type not in LLAMA_NAMES:
        return []
    mix = f"gguf:{LLAMA_NAMES[target.type]}{MEASURED.get(target.type, '')}"
    return [f"{target} is that type in every linear; what llama.cpp calls {target.type} is the mix {mix}."]


@dataclass(frozen=True)
class Layer:
    """The facts about a tensor's decoder block and model by which llama.cpp's rules choose its type.

    architecture     llama.cpp's name of the architecture
    index, count     number of the tensor's decoder block or, where llama.cpp counts tensors, of the tensor among those
                     of its sort (`sort_of`), and number of all blocks or tensors
    queries_per_key  number of query heads that share one key head
    experts          number of experts of a block, 0 where there are none
    """

    architecture: str
    index: int
    count: int
    queries_per_key: int
    experts: int = 0

    @property
    def first(self) -> bool:
        """Whether the block is in the first eighth."""
        return self.index < self.count // 8

    @property
    def inner(self) -> bool:
        """Whether the block is neither in the first nor in the last eighth."""
        return not self.first and self.index < 7 * self.count // 8

    @property
    def favoured(self) -> bool:
        """Whether the block is in the first or last eighth, or every third between: llama.cpp's `use_more_bits`."""
        return not self.inner or (self.index - self.count // 8) % 3 == 2

    @property
    def large(self) -> bool:
        """Whether llama.cpp takes the model for a 70B one of Llama 2, Llama 3 or Qwen, because it has 80 blocks.

        The value projections of these models are an eighth of the query projections, so more bits cost little.
        """
        grouped = self.architecture == "llama" and self.queries_per_key > 1
        return self.count == 80 and (grouped or self.architecture == "qwen2")


Rule = Callable[[Layer], str | None]
"""A function that returns the type of a tensor, or None for the mix's most frequent type."""

_RULES: dict[str, dict[str, Rule]] = {
    "Q2_K_M": {
        "attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else "Q3_K",
        "attn_output": lambda layer: "Q3_K",
        "ffn_down": lambda layer: "Q3_K",
    },
    "Q2_K_S": {
        "attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else None,
        "ffn_down": lambda layer: "Q4_K" if layer.first else None,
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
        "ffn_down": lambda layer: "Q5_K" if layer.first else None,
    },
    "Q4_K_M": {
        "attn_v": lambda layer: "Q6_K" if layer.favoured else None,
        "ffn_down": lambda layer: "Q6_K" if layer.favoured else None,
    },
    "Q5_K_M": {
        "attn_v": lambda layer: "Q6_K" if layer.favoured else None,
        "ffn_down": lambda layer: "Q6_K" if layer.favoured else None,
    },
    "IQ3_XXS_MIX": {
        "attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else None,
        "attn_q": lambda layer: "IQ2_S",
        "attn_k": lambda layer: "IQ2_S",
        "attn_output": lambda layer: "IQ3_S",
    },
    "IQ3_XS": {
        "attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else None,
        "attn_q": lambda layer: "IQ3_XXS",
        "attn_k": lambda layer: "IQ3_XXS",
        "ffn_gate": lambda layer: "IQ3_XXS" if layer.inner else None,
        "ffn_up": lambda layer: "IQ3_XXS" if layer.inner else None,
    },
    "IQ3_S_MIX": {"attn_v": lambda layer: "Q4_K" if layer.queries_per_key >= 4 else None},
    "IQ3_M": {
        "attn_v": lambda layer: "Q4_K",
        "attn_output": lambda layer: "Q4_K",
        "ffn_down": lambda layer: "Q4_K" if layer.first or (layer.experts == 8 and layer.favoured) else None,
    },
    "IQ4_XS_MIX": {"attn_v": lambda layer: "Q5_K" if layer.queries_per_key >= 4 else None},
    "IQ4_NL_MIX": {"attn_v": lambda layer: "Q5_K" if layer.queries_per_key >= 4 else None},
}

_FALCON: dict[str, dict[str, Rule]] = {
    **{mix: {"attn_output": lambda layer: None} for mix in ("Q2_K_M", "IQ3_XXS_MIX", "IQ3_M")},
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
"""The rules that are different for Falcon."""

VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
"""The GGUF names of linears that compute the values of attention, alone or among others."""

OF_HEADS = ("attn_k_b", "attn_v_b")
"""The GGUF names of linears that are [heads, rows, columns], which llama.cpp takes for experts in MXFP4_MOE."""


def sort_of(module: str) -> str:
    """Returns the linear whose rules a linear follows, by the GGUF names of their modules.

    `attn_v` for a fused `attn_qkv`, `ffn_down` for stacked `ffn_down_exps`, `attn_k` for `indexer.attn_k`.
    """
    if module in VALUES:
        return "attn_v"
    sorts = ("ffn_down", "ffn_up", "ffn_gate")
    return next((sort for sort in sorts if module.startswith(sort)), module.removeprefix("indexer."))


def mix_type(mix: str, module: str, layer: Layer) -> str:
    """Returns the type of a block's linear in one of `MIXES`, before any fallback.

    module   GGUF name of the linear's module, such as `attn_v`
    """
    if mix == "MXFP4_MOE":
        return "MXFP4" if module.endswith("_exps") or module in OF_HEADS else MIXES[mix]
    module = sort_of(module)
    if mix in SMALLEST:
        return _of_smallest(mix, module, layer)
    if layer.experts == 8 and module in ("attn_k", "attn_v", "attn_output"):
        return _beside_eight_experts(mix, module)
    rules = _RULES.get(mix, {}) | (_FALCON.get(mix, {}) if layer.architecture == "falcon" else {})
    rule = rules.get(module)
    gguf_type = (rule(layer) if rule else None) or MIXES[mix]
    return "Q5_K" if module == "attn_v" and layer.large and gguf_type in ("Q3_K", "Q4_K") else gguf_type


def _of_smallest(mix: str, module: str, layer: Layer) -> str:
    """Returns the type of a block's linear in a mix of `SMALLEST`; `module` is a sort (`sort_of`)."""
    more = "IQ3_S" if mix in ("IQ2_S_MIX", "IQ2_M") else "Q2_K"
    if module == "attn_v":
        return "Q4_K" if layer.queries_per_key >= 4 or layer.experts >= 4 else more
    if module == "attn_k" and layer.experts == 8:
        return "Q4_K"
    if module == "ffn_down" and layer.first:
        return more
    if module == "attn_output" and layer.experts == 8:
        return "Q5_K"
    if module == "attn_output" and (more == "IQ3_S" or mix.startswith("IQ1")):
        return "IQ3_S" if more == "IQ3_S" else "IQ2_XXS"
    return MIXES[mix]


def _beside_eight_experts(mix: str, module: str) -> str:
    """Returns the type of an attention linear in a model of eight experts, where attention is few of the weights."""
    if module == "attn_output":
        larger = mix.startswith(("IQ3", "IQ4")) or mix in ("Q2_K_M", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
        return "Q5_K" if larger else MIXES[mix]
    return "Q8_0"


def mix_output(mix: str, architecture: str, columns: int) -> str:
    """Returns the type of the output, or of an embedding tied to it, in one of `MIXES`."""
    if mix == "MXFP4_MOE" or columns % (32 if mix == "IQ4_NL_MIX" else 256) or architecture == "falcon":
        return "Q8_0"
    return "Q5_K" if mix in (*SMALLEST, "IQ3_XXS_MIX") else "Q6_K"


def mix_embedding(mix: str) -> str:
    """Returns the type of an embedding that is not tied to the output, in one of `MIXES`, before any fallback."""
    if mix in ("IQ2_S_MIX", "IQ2_M", "IQ3_XXS_MIX"):
        return "IQ3_S"
    if mix in SMALLEST:
        return "Q2_K"
    return "Q4_K" if mix.startswith("TQ") else MIXES[mix]


def file_type(name: str) -> int:
    """Returns `general.file_type` (llama_ftype) of a pure type or mix.

    A pure K type has the number of its S mix, as `llama-quantize --pure` writes it.
    """
    renamed = {"F32": "ALL_F32", "Q2_K_M": "MOSTLY_Q2_K", "Q6_K_M": "MOSTLY_Q6_K"}
    renamed |= {"MXFP4": "MOSTLY_MXFP4_MOE"}  # llama.cpp has no number for the pure type
    renamed |= {pure: f"MOSTLY_{pure}_S" for pure in ("Q3_K", "Q4_K", "Q5_K")}
    return int(LlamaFileType[renamed.get(name, f"MOSTLY_{name.removesuffix('_MIX')}")])


def fallback_type(gguf_type: str, columns: int) -> str:
    """Returns the type that replaces `gguf_type`, whose blocks do not divide the number of columns.

    F16 is what llama.cpp takes if the fallback does not fit either. (If a type with blocks of 32 does not fit,
    llama.cpp stops; here F16 replaces it too.)
    """
    return FALLBACKS[gguf_type] if gguf_type in FALLBACKS and columns % 32 == 0 else "F16"
