"""The models that mlx-lm runs as transformers does."""

from __future__ import annotations

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.engine_checks import check_fixed, check_without_windows
from lqexport.converters.models.rope import rope_settings
from lqexport.converters.models.windows import window_period
from lqexport.errors import UserError, with_advice

SCALED = ("dynamic", "linear", "llama3", "yarn")
"""The types of rope scaling of models that share mlx-lm's code for it; within the context, `dynamic` changes nothing.
"""
MODEL_TYPES: dict[str, tuple[str, ...]] | None = {
    "llama": SCALED, "mistral": SCALED, "qwen2": SCALED, "qwen3": SCALED, "smollm3": SCALED, "olmo2": SCALED,
    "ministral3": ("yarn",), "olmo3": ("yarn",), "deepseek_v2": ("yarn",), "gemma3_text": ("linear",),
    "phi3": ("longrope",),
} | dict.fromkeys((
    "cohere", "cohere2", "ernie4_5", "gemma", "glm4_moe", "granite", "hunyuan_v1_dense", "mixtral", "nemotron", "olmoe",
    "phi", "qwen2_moe", "qwen3_moe", "seed_oss", "stablelm", "starcoder2",
), ())  # fmt: skip
"""`model_type` of the models whose logits in mlx-lm were those of transformers (tools/mlx_models.py) -> the types of
rope scaling that it computes for them; None in place of all this for any model."""
WINDOWED = ("cohere2", "gemma3_text", "olmo3")
"""Those of them in which mlx-lm heeds sliding windows."""


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if mlx-lm lacks the architecture, or computes it in another way than config.json says."""
    if MODEL_TYPES is None:
        return
    name, model_type = architecture.classes[0], str(config.get("model_type"))
    with with_advice("Choose another target."):
        if model_type not in MODEL_TYPES:
            raise UserError(
                f"MLX folders of {name} ({model_type}) are not written: mlx-lm does not run it, or not as transformers "
                "does, or wants its tensors in another form."
            )
        check_fixed("mlx-lm", architecture, config)
        rope_type = rope_settings(config)["rope_type"]
        if rope_type not in ("default", *MODEL_TYPES[model_type]):
            raise UserError(f"mlx-lm has no rope scaling of type {rope_type!r} for {name}.")
        if model_type in WINDOWED:
            window_period("mlx-lm", architecture, config)
        else:
            check_without_windows("mlx-lm", architecture, config)
