"""Checks, before any work, that llama.cpp computes a model as its config.json says."""

from __future__ import annotations

import math
from typing import Any

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.hf_defaults import FULL, SLIDING, default_of, default_rope
from lqexport.converters.models.rope import head_dim, rope_sections, rope_settings, rotary_dim, window_theta
from lqexport.converters.models.tensor_names import head_count
from lqexport.errors import UserError

SAME_ACTIVATIONS = {"swish": "silu", "gelu_python": "gelu", "gelu_new": "gelu_pytorch_tanh"}
SAME_ACTIVATIONS |= {"gelu_fast": "gelu_pytorch_tanh", "gelu_python_tanh": "gelu_pytorch_tanh"}
"""transformers' other names of an activation (`ACT2FN`), and the usual one."""


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if llama.cpp lacks the architecture, or computes it in another way than config.json says."""
    name = architecture.classes[0]
    if architecture.gguf is None:
        raise UserError(
            f"llama.cpp does not run {name}, so there is no GGUF of it. Choose a native target, such as native:table-4."
        )
    check_fixed("llama.cpp", architecture, config)
    if (reason := architecture.refuses(config)) is not None:
        raise UserError(reason)
    _check_rope(architecture, config)
    _check_scale(architecture, config)
    _check_heads(architecture, config)
    _check_keys(architecture, config)
    window_period(architecture, config)
    _check_types(architecture)


def _check_types(architecture: Architecture) -> None:
    present = {value for values in architecture.per_block.values() for value in values}
    if missing := [value for value in architecture.needs_types if value not in present]:
        raise UserError(
            f"llama.cpp runs {architecture.classes[0]} only where some block is {_alternatives(tuple(missing))}, and "
            "by config.json none is."
        )


def check_fixed(engine: str, architecture: Architecture, config: Config) -> None:
    """Raises UserError if config.json has a value that is not among the architecture's `fixed` ones, or not `same`.

    engine   name of the program that runs the model, for the message
    """
    for key, allowed in architecture.fixed.items():
        if key in config and not _is_allowed(config[key], allowed):
            untied = key == "tie_word_embeddings" and not config[key]
            given = "the model's output is not its embedding" if untied else f"config.json has {config[key]!r}"
            raise UserError(
                f"{engine} computes {architecture.classes[0]} with {key} {_alternatives(allowed)}, and {given}."
            )
    for key, other in architecture.same.items():
        if config.get(key) not in (None, config.get(other)):
            raise UserError(
                f"{engine} computes {architecture.classes[0]} with {key} equal to {other}, and config.json has "
                f"{config[key]!r} and {config.get(other)!r}."
            )


def _check_keys(architecture: Architecture, config: Config) -> None:
    """Raises UserError if config.json lacks a setting that llama.cpp needs, or has null where null is not the default.

    Null is not an absent key: transformers takes its default for an absent key alone.
    """
    for key in architecture.keys:
        settings = rope_settings(config) if key.rope else config
        if key.default is None and settings.get(key.config) is None:
            raise UserError(f"config.json gives no {key.config}.")
        is_null = key.config in settings and settings[key.config] is None
        if is_null and not key.rope and key.default == default_of(architecture, config, key.config):
            raise UserError(
                f"llama.cpp computes {architecture.classes[0]} with a number for {key.config}, and config.json has "
                "null."
            )


def _is_allowed(value: Any, allowed: tuple[Any, ...]) -> bool:
    names = {SAME_ACTIVATIONS.get(each, each) for each in allowed if isinstance(each, str)}
    return value in allowed or (isinstance(value, str) and SAME_ACTIVATIONS.get(value, value) in names)


def _alternatives(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in allowed)


def _check_rope(architecture: Architecture, config: Config) -> None:
    settings = rope_settings(config)
    rope_type = settings["rope_type"]
    if architecture.rope_types and rope_type not in architecture.rope_types:
        raise UserError(f"llama.cpp has no rope scaling of type {rope_type!r} for {architecture.classes[0]}.")
    if rope_type in ("linear", "yarn") and not settings.get("factor"):
        raise UserError(f"config.json: rope scaling of type {rope_type} needs factor.")
    share = settings.get("partial_rotary_factor")
    if not architecture.partial and share not in (None, 0, 1):
        raise UserError(
            f"llama.cpp rotates whole heads of {architecture.classes[0]}, and partial_rotary_factor of config.json is "
            f"{share}."
        )
    if architecture.latent and architecture.partial and share and round(head_dim(config) * share) != rotary_dim(config):
        raise UserError(
            f"config.json: partial_rotary_factor is {share}, and {rotary_dim(config)} of {head_dim(config)} columns of "
            "a head are rotated."
        )
    if architecture.rope_types and (rotary_dim(config) < 1 or rotary_dim(config) % 2):
        raise UserError(
            f"llama.cpp rotates pairs of columns, and by config.json {rotary_dim(config)} are to be rotated."
        )
    if rope_type == "yarn":
        _check_yarn(architecture, settings)
        _check_mscale(architecture, settings)
    if architecture.period is not None or architecture.any_windows:
        check_window_scaling("llama.cpp", architecture, config)
        _check_window_theta(architecture, config)
    if architecture.rope_sections:
        rope_sections(architecture, config)
    rotated = config.get("no_rope_layers")  # 1 for a block with rotation, despite the name
    if rotated and rotated != [int((layer + 1) % 4 != 0) for layer in range(len(rotated))]:
        raise UserError(f"llama.cpp leaves out the rotation in every fourth block; no_rope_layers is {rotated}.")


def check_window_scaling(engine: str, architecture: Architecture, config: Config) -> None:
    """Raises UserError if blocks with a sliding window have rope scaling, or if it is not said for which blocks it is.

    engine   name of the program that runs the model, for the message
    """
    rope = config.get("rope_parameters") or {}
    window_type = (rope.get(SLIDING) or {}).get("rope_type", "default")
    if window_type != "default":
        raise UserError(f"{engine} has no rope scaling within windows, and config.json has {window_type!r}.")
    # transformers ignores such settings of these models.
    if rope and SLIDING in default_rope(architecture) and not rope.keys() & {FULL, SLIDING}:
        raise UserError(f"rope_parameters of config.json must have settings of {FULL} and {SLIDING}, not {rope}.")


def _check_window_theta(architecture: Architecture, config: Config) -> None:
    theta, within = float(rope_settings(config)["rope_theta"]), window_theta(config)
    if architecture.one_theta and within not in (None, theta):
        raise UserError(
            f"llama.cpp rotates all blocks of {architecture.classes[0]} with rope_theta {theta:g}, and config.json has "
            f"{within:g} within windows."
        )


def _check_mscale(architecture: Architecture, settings: dict[str, Any]) -> None:
    """Raises UserError if llama.cpp would scale the products of queries and latent keys otherwise than transformers."""
    given, only = (settings.get("mscale"), settings.get("mscale_all_dim")), architecture.only_mscale
    if architecture.latent and (not given[1] or given[0] != given[1] or only not in (None, given[1])):
        raise UserError(
            f"llama.cpp computes yarn for {architecture.classes[0]} with equal mscale and mscale_all_dim"
            f"{f' of {only:g}' if only else ''}, and config.json has {given[0]} and {given[1]}."
        )


def _check_yarn(architecture: Architecture, settings: dict[str, Any]) -> None:
    # GGUF has keys for some of these settings, but llama.cpp does not read them for every architecture.
    fixed = {"beta_fast": 32, "beta_slow": 1, "truncate": not architecture.unrounded_yarn}
    variable = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    # transformers ignores a context length that is given beside the original one.
    variable |= {"max_position_embeddings"} | {key.config for key in architecture.keys if key.rope}
    others = {key: value for key, value in settings.items() if key not in variable and value is not None}
    others.setdefault("truncate", True)
    if architecture.mscale and others.get("mscale") and others["mscale"] == others.get("mscale_all_dim"):
        # Equal values leave the rotation unchanged. In latent attention they scale the products of queries and keys.
        del others["mscale"], others["mscale_all_dim"]
    if not architecture.mscale and not (others.get("mscale") and others.get("mscale_all_dim")):
        # transformers ignores one without the other.
        others = {key: value for key, value in others.items() if key not in ("mscale", "mscale_all_dim")}
    usual = 0.1 * math.log(settings.get("factor") or 1) + 1
    if math.isclose(others.get("attention_factor", 0), usual, rel_tol=1e-6):
        del others["attention_factor"]
    if strange := [key for key, value in others.items() if value != fixed.get(key)]:
        raise UserError(
            f"llama.cpp computes yarn for {architecture.classes[0]} without {', '.join(strange)} of config.json."
        )


def query_scalar(architecture: Architecture, config: Config) -> int:
    """Returns the number by whose square root llama.cpp divides queries."""
    wide = config.get("num_hidden_layers") == architecture.wide_scale
    return int(config["hidden_size"]) // head_count(config) if wide else head_dim(config)


def _check_scale(architecture: Architecture, config: Config) -> None:
    if architecture.wide_scale is None or "query_pre_attn_scalar" not in config:
        return
    if (wanted := config["query_pre_attn_scalar"]) != (computed := query_scalar(architecture, config)):
        raise UserError(
            f"llama.cpp computes {architecture.classes[0]} with query_pre_attn_scalar {computed} for these sizes, and "
            f"config.json has {wanted}."
        )


def _check_heads(architecture: Architecture, config: Config) -> None:
    heads, size, hidden = head_count(config), head_dim(config), config["hidden_size"]
    if architecture.square_heads and heads * size != hidden:
        raise UserError(
            f"llama.cpp wants heads of {architecture.classes[0]} that add up to hidden_size; config.json has {heads} "
            f"heads of {size} columns, and hidden_size {hidden}."
        )


def window(config: Config) -> int | None:
    """Returns the size of the sliding window in tokens; None where all blocks attend to the whole context."""
    if config.get("use_sliding_window") is False or SLIDING not in (config.get("layer_types") or [SLIDING]):
        return None
    return config.get("sliding_window")


def window_period(architecture: Architecture, config: Config) -> int | None:
    """Returns n where every n-th block attends to the whole context and the others to a sliding window.

    Returns None for an architecture whose windows llama.cpp ignores. Raises UserError if the blocks of config.json do
    not follow such a pattern.
    """
    if architecture.needs_windows and window(config) is None:
        raise UserError(
            f"llama.cpp computes {architecture.classes[0]} with sliding windows in some blocks, and config.json has "
            "none."
        )
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
    """Returns `layer_types` of config.json where every `period`-th block attends to the whole context."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
