"""Checks, before any work, that llama.cpp computes a model as its config.json says."""

from __future__ import annotations

import math
from typing import Any

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.engine_checks import alternatives, check_fixed, check_window_scaling
from lqexport.converters.models.hf_defaults import default_of
from lqexport.converters.models.rope import head_dim, rope_sections, rope_settings, rotary_dim, window_theta
from lqexport.converters.models.tensor_names import head_count
from lqexport.converters.models.windows import window_period
from lqexport.errors import UserError, with_advice


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if llama.cpp lacks the architecture, or computes it in another way than config.json says."""
    with with_advice("Choose a native target, such as native:table-4."):
        if architecture.gguf is None:
            raise UserError(f"llama.cpp does not run {architecture.classes[0]}, so there is no GGUF of it.")
        check_fixed("llama.cpp", architecture, config)
        if (reason := architecture.refuses(config)) is not None:
            raise UserError(reason)
        _check_rope(architecture, config)
        _check_scale(architecture, config)
        _check_heads(architecture, config)
        _check_keys(architecture, config)
        window_period("llama.cpp", architecture, config)
        _check_types(architecture)


def _check_types(architecture: Architecture) -> None:
    present = {value for values in architecture.per_block.values() for value in values}
    if missing := [value for value in architecture.needs_types if value not in present]:
        raise UserError(
            f"llama.cpp runs {architecture.classes[0]} only where some block is {alternatives(tuple(missing))}, and "
            "by config.json none is."
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
