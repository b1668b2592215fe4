"""mlx-lm's names for the tensors of a model: the experts of a block share one tensor, [experts, rows, ...]."""

from __future__ import annotations

import re

from lqexport.errors import UserError

EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
STACKS = {
    "ernie4_5_moe": ".mlp.switch_mlp.",
    "mixtral": ".block_sparse_moe.switch_mlp.",
    "qwen2_moe": ".mlp.switch_mlp.",
    "qwen3_moe": ".mlp.switch_mlp.",
}
"""`model_type` -> what stands in place of `.mlp.experts.N.` in the name of the tensor of all experts.

mlx-lm stacks the experts of other models as it loads them, with their scales and biases."""
RENAMED = {"mixtral": {".mlp.gate.": ".block_sparse_moe.gate."}}
"""`model_type` -> part of a name -> what mlx-lm has in its place."""


def stored_name(model_type: str, name: str) -> str:
    """Returns the name under which a folder stores a tensor, or the tensor of all experts that it is a part of."""
    if model_type in STACKS:
        name = EXPERT.sub(STACKS[model_type], name)
    for part, new in RENAMED.get(model_type, {}).items():
        name = name.replace(part, new)
    return name


def check_experts(model_type: str, codecs: dict[str, str]) -> None:
    """Raises UserError if tensors that a folder stores as one are in different types.

    codecs   name of a tensor -> its codec
    """
    types: dict[str, str] = {}
    for name, codec_name in codecs.items():
        if (first := types.setdefault(stored_name(model_type, name), codec_name)) != codec_name:
            raise UserError(
                f"mlx-lm has the experts of a block in one type: choose the same one for all of them ({name} would be "
                f"in {codec_name}, others in {first})."
            )


def expert_of(model_type: str, name: str) -> int | None:
    """Returns the number of the expert that a tensor belongs to, if a folder stores those of a block together."""
    match = EXPERT.search(name) if model_type in STACKS else None
    return int(match[1]) if match else None
