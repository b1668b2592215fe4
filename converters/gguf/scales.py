"""The further scales of matrices in GGUF files: `X.scale` beside `X.weight`, one float32 or one for each expert.

llama.cpp loads such tensors for most matrices of all architectures. It multiplies by one only where the architecture's
graph says so, and is silent where it does not.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.tensor_names import gguf_names, is_linear
from lqexport.converters.plan import PlannedTensor
from lqexport.formats.gguf import WITH_SCALE

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_FUSED_ATTENTION = ("attn_qkv", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_STATES = ("ssm_in", "ssm_out")
_DELTA = ("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta", "ssm_out")

APPLIED: dict[str, tuple[str, ...]] = {
    "llama": (*_ATTENTION, *_MLP, *_EXPERTS),
    # Its router's weights are called ffn_down_exps.scale.
    "gemma4": (*_ATTENTION, *_MLP, "ffn_gate_exps", "ffn_up_exps"),
    "qwen3moe": (*_ATTENTION, *_EXPERTS),
    "qwen3next": (*_ATTENTION, *_EXPERTS, *_SHARED),
    "qwen35": (*_ATTENTION, *_MLP, *_DELTA),
    "qwen35moe": (*_ATTENTION, *_EXPERTS, *_SHARED, *_DELTA),
    "nemotron_h": (*_ATTENTION, *_MLP, *_STATES),
    "nemotron_h_moe": (*_ATTENTION, *_EXPERTS, *_SHARED, *_STATES),
    **dict.fromkeys(("qwen3", "mistral3", "cohere2"), (*_ATTENTION, *_MLP)),
    **dict.fromkeys(("deepseek32", "glm-dsa"), ("attn_output", *_MLP, *_EXPERTS, *_SHARED)),
    **dict.fromkeys(("granitehybrid", "falcon-h1", "jamba"), (*_ATTENTION, *_STATES)),
    **dict.fromkeys(("mamba", "mamba2"), _STATES),
    **dict.fromkeys(("falcon", "gpt2", "gptneox", "phi3"), _FUSED_ATTENTION),
    **dict.fromkeys(("deepseek2", "mimo2", "mistral4"), ("attn_output",)),
    **dict.fromkeys(
        (
            "afmoe", "apertus", "arcee", "chatglm", "command-r", "dots1", "ernie4_5", "ernie4_5-moe", "exaone-moe",
            "exaone4", "gemma", "gemma2", "gemma3", "gemma3n", "glm4", "glm4moe", "gpt-oss", "granite", "granitemoe",
            "hunyuan-dense", "hunyuan-moe", "lfm2", "lfm2moe", "llama4", "minimax-m2", "nemotron", "olmo2", "olmoe",
            "phi2", "qwen2", "qwen2moe", "qwen2vl", "qwen3vl", "qwen3vlmoe", "seed_oss", "smollm3", "stablelm",
            "starcoder2",
        ),
        _ATTENTION,
    ),
}  # fmt: skip
"""Architecture of GGUF -> the matrices of its blocks that llama.cpp (86a2835) multiplies by a further scale.

They were found by running a random model of each architecture in llama.cpp, once with scales and once with weights
that are multiplied by them (`bench/gguf_scales.py`). The other architectures have none."""


def scale_name(name: str) -> str:
    """Returns the name of the tensor with the further scale of a matrix, by the matrix's name in the file."""
    return f"{name.removesuffix('.weight')}.scale"


def matrix_of(name: str) -> str:
    """Returns the matrix of a block that a tensor of a file is, such as attn_q for blk.0.attn_q.weight."""
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


def with_scales(architecture: Architecture, layers: int, planned: list[PlannedTensor]) -> list[PlannedTensor]:
    """Returns the plan of a GGUF file with a further scale beside each linear of NVFP4 for which llama.cpp applies it.

    layers   number of decoder blocks

    A matrix of an MLP that has a bias gets none: llama.cpp would multiply the bias, too, and stops where it sees that.
    """
    applied = APPLIED.get(str(architecture.gguf), ())
    known, names = gguf_names(architecture, layers), {tensor.name for tensor in planned}

    def takes_scale(name: str) -> bool:
        if not is_linear(architecture, name):
            return False
        matrix = matrix_of(known[name])
        has_bias = f"{name.removesuffix('.weight')}.bias" in names
        return matrix in applied and not (has_bias and matrix.startswith("ffn_"))

    return [
        replace(tensor, codec_name=WITH_SCALE[tensor.codec_name])
        if tensor.codec_name in WITH_SCALE and takes_scale(tensor.name)
        else tensor
        for tensor in planned
    ]
