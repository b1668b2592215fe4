"""Variations of the config.json of every family's case: one key left out, in the styles of transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import transformers
from family_cases import CASES

from lqexport.converters.models.hf_defaults import options_of

Config = dict[str, Any]


def completed(class_name: str, options: Config) -> Config:
    """Returns config.json with every key that transformers' class has, for a model with these options."""
    config_class = getattr(transformers, class_name)
    config = config_class(**{key: value for key, value in options_of(options).items() if key != "model_type"})
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class].__name__
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": [model_class]}


def older(config: Config) -> Config:
    """Returns a config.json with its rotary settings as before transformers 5, where one object holds them for all."""
    rope = dict(config.get("rope_parameters") or {})
    if not rope or "full_attention" in rope:
        return config
    if "compress" in rope:  # the settings that both have are keys of their own
        scaling = {key: value for key, value in rope["compress"].items() if key not in config}
        return {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_scaling": scaling}
    theta, partial = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
    usual, neox = ("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct")
    names = neox if config["model_type"] == "gpt_neox" else usual
    settings = dict(zip(names, (theta, partial), strict=True)) | {"rope_scaling": rope}
    others = {key: value for key, value in config.items() if key != "rope_parameters"}
    return others | {key: value for key, value in settings.items() if value is not None}


def lacking_one_key(config: Config) -> Iterator[tuple[str, Config]]:
    """Yields (key, config.json without it) for every key, also those within the rotary settings."""
    for key in config.keys() - {"architectures", "model_type"}:
        yield key, {other: value for other, value in config.items() if other != key}
    for name in ("rope_parameters", "rope_scaling"):
        for key, value in lacking_one_key(config[name]) if config.get(name) else ():
            yield f"{name}.{key}", config | {name: value}
        for block_type, settings in (config.get(name) or {}).items():
            for key, value in lacking_one_key(settings) if isinstance(settings, dict) else ():
                yield f"{name}.{block_type}.{key}", config | {name: config[name] | {block_type: value}}


def configs_without_a_key(name: str) -> Iterator[tuple[str, Config, Config]]:
    """Yields (key, config.json without it, that config.json with transformers' defaults) for a case of `CASES`.

    Keys without which transformers makes no config are left out.
    """
    class_name, options, _ = CASES[name]
    config = completed(class_name, options)
    for style in (config, older(config)):
        for key, lacking in lacking_one_key(style):
            try:
                complete = completed(class_name, lacking)
            except Exception:  # each class raises exceptions of its own
                continue
            yield key, lacking, complete
