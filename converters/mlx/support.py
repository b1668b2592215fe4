"""The models that mlx-lm runs as transformers does, and what config.json must say for that."""

from __future__ import annotations

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.errors import UserError

MODEL_TYPES: frozenset[str] | None = frozenset({"llama"})
"""`model_type` of the models whose logits in mlx-lm were those of transformers (tools/mlx_models.py); None for any."""


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if mlx-lm lacks the architecture, or computes it in another way than config.json says."""
    model_type = str(config.get("model_type"))
    if MODEL_TYPES is not None and model_type not in MODEL_TYPES:
        raise UserError(
            f"MLX folders of {architecture.classes[0]} ({model_type}) are not written: mlx-lm does not run it, or has "
            "not been compared with transformers. Choose another target."
        )
