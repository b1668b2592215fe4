"""The models that mlx-lm runs as transformers does."""

from __future__ import annotations

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.errors import UserError

MODEL_TYPES: frozenset[str] | None = frozenset((
    "cohere", "cohere2", "deepseek_v2", "ernie4_5", "gemma", "gemma3_text", "glm4_moe", "granite", "hunyuan_v1_dense",
    "llama", "ministral3", "mistral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen3",
    "seed_oss", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
"""`model_type` of the models whose logits in mlx-lm were those of transformers (tools/mlx_models.py); None for any."""


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if mlx-lm lacks the architecture, or has not been compared with transformers on it."""
    model_type = str(config.get("model_type"))
    if MODEL_TYPES is not None and model_type not in MODEL_TYPES:
        raise UserError(
            f"MLX folders of {architecture.classes[0]} ({model_type}) are not written: mlx-lm does not run it, or not "
            "as transformers does, or wants its tensors in another form. Choose another target."
        )
