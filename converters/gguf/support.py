"""What llama.cpp computes for an architecture, and what it does not: known from config.json, before any work."""

from __future__ import annotations

from typing import Any

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.rope import head_dim, rope_settings
from lqexport.converters.models.tensor_names import head_count
from lqexport.errors import UserError

FULL, SLIDING = "full_attention", "sliding_attention"


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError where llama.cpp lacks the architecture or computes it in another way than config.json asks."""
    name = architecture.classes[0]
    if architecture.gguf is None:
        raise UserError(
            f"llama.cpp does not run {name}, so there is no GGUF of it. Choose a native target, such as native:table-4."
        )
    check_fixed("llama.cpp", architecture, config)
    _check_rope(architecture, config)
    _check_scale(architecture, config)
    window_period(architecture, config)


def check_fixed(engine: str, architecture: Architecture, config: Config) -> None:
    """Raises UserError where config.json asks for what the `engine` does not have."""
    for key, allowed in architecture.fixed.items():
        if key in config and config[key] not in allowed:
            raise UserError(
                f"{engine} computes {architecture.classes[0]} with {key} {_listed(allowed)}, and config.json has "
                f"{config[key]!r}."
            )


def _listed(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in allowed)


def _check_rope(architecture: Architecture, config: Config) -> None:
    settings = rope_settings(config)
    kind = settings["rope_type"]
    if architecture.rope_types and kind not in architecture.rope_types:
        raise UserError(f"llama.cpp has no rope scaling of type {kind!r} for {architecture.classes[0]}.")
    if kind == "yarn":
        _check_yarn(architecture, settings)
    without = config.get("no_rope_layers")
    if without and without != [int((layer + 1) % 4 != 0) for layer in range(len(without))]:
        raise UserError(f"llama.cpp leaves out the rotation in every fourth block; no_rope_layers is {without}.")


def _check_yarn(architecture: Architecture, settings: dict[str, Any]) -> None:
    # There are keys for some of these, but llama.cpp does not read them for every architecture.
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1.0}
    variable = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
    others = {key: value for key, value in settings.items() if key not in variable and value is not None}
    if architecture.latent and others.get("mscale") and others["mscale"] == others.get("mscale_all_dim"):
        del others["mscale"], others["mscale_all_dim"]  # it scales the products of queries and keys, not their rotation
    if strange := [key for key, value in others.items() if value != fixed.get(key)]:
        raise UserError(
            f"llama.cpp computes yarn for {architecture.classes[0]} without {', '.join(strange)} of config.json."
        )


def query_scalar(architecture: Architecture, config: Config) -> int:
    """What llama.cpp divides queries by the square root of."""
    wide = config.get("num_hidden_layers") == architecture.wide_scale
    return int(config["hidden_size"]) // head_count(config) if wide else head_dim(config)


def _check_scale(architecture: Architecture, config: Config) -> None:
    if architecture.wide_scale is None or "query_pre_attn_scalar" not in config:
        return
    if (wanted := config["query_pre_attn_scalar"]) != (found := query_scalar(architecture, config)):
        raise UserError(
            f"llama.cpp computes {architecture.classes[0]} with query_pre_attn_scalar {found} for these sizes, and "
            f"config.json has {wanted}."
        )


def window(config: Config) -> int | None:
    """How many tokens the blocks that do not attend to the whole context see; None where all blocks do."""
    if config.get("use_sliding_window") is False or SLIDING not in config.get("layer_types", [SLIDING]):
        return None
    return config.get("sliding_window")


def window_period(architecture: Architecture, config: Config) -> int | None:
    """Every so many blocks attend to the whole context, and the others to a window; None for an architecture where
    llama.cpp knows no windows. Raises UserError where there is no such number."""
    if architecture.period is None or window(config) is None:
        return architecture.period and 1
    types = config.get("layer_types")
    if types is None:
        return int(config.get("sliding_window_pattern") or architecture.period)
    period = types.index(FULL) + 1 if FULL in types else len(types) + 1
    if types != layer_types(period, len(types)):
        raise UserError(f"Windows can be in all but every n-th block; layer_types of config.json is {types}.")
    return period


def layer_types(period: int, layers: int) -> list[str]:
    """`layer_types` of config.json."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
