"""The values that transformers takes for keys that config.json leaves out.

They are read from transformers' own config classes, so they are written down nowhere here. transformers is imported
when the first value is asked for.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from lqexport.converters.models.architecture import Architecture, Config

LAYER_TYPES = "layer_types"
FULL, SLIDING = "full_attention", "sliding_attention"
"""The types of blocks in `layer_types` of config.json; nested `rope_parameters` have one object for each type."""
READ = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "vocab_size", "type_vocab_size", "max_position_embeddings",
    "original_max_position_embeddings", "query_pre_attn_scalar", "sliding_window", "use_sliding_window",
    "tie_word_embeddings",
)  # fmt: skip
"""Keys that the program reads for every architecture, rotary settings aside."""


def default_of(architecture: Architecture, config: Config, key: str) -> Any:
    """Returns the value that transformers takes where config.json leaves out `key`; None if it has none."""
    values, _ = _class_defaults(_config_class(architecture, config))
    return values.get(_name_of(architecture, values, key))


def default_rope(architecture: Architecture) -> Config:
    """Returns the rotary settings that transformers takes where config.json has none; {} if positions are learned."""
    return _class_defaults(_config_class(architecture, {}))[1]


def filled_in(architecture: Architecture, config: Config) -> Config:
    """Returns the config under the usual names of its keys, with keys added that the program reads and it leaves out.

    A key whose default is None is not added: what it stands for follows from other keys.
    """
    config_class = _config_class(architecture, config)
    values, rope = _class_defaults(config_class)
    given = {usual for alias, usual in architecture.aliases.items() if alias in config} | config.keys()
    if config.get(LAYER_TYPES) is None:  # transformers takes null as if it were left out
        given -= {LAYER_TYPES}
    names = {key: _name_of(architecture, values, key) for key in _read_keys(architecture) if key not in given}
    names = {key: name for key, name in names.items() if values.get(name) is not None}
    rotary = _missing_rotary(config, rope)
    if not names and not rotary:
        return config
    made = _made(config_class, config)
    rotary = _missing_rotary(config, getattr(made, "rope_parameters", None) or {})
    written = made.to_dict()  # some classes keep another value than config.json has: half a window in EmbeddingGemma
    return config | {key: written.get(name, _value(made, name)) for key, name in names.items()} | rotary


def _name_of(architecture: Architecture, values: Config, key: str) -> str:
    """Returns the name under which a config class has a key: the usual name, or this family's."""
    aliases = [alias for alias, usual in architecture.aliases.items() if usual == key]
    return next((name for name in (key, *aliases) if name in values), key)


def _read_keys(architecture: Architecture) -> list[str]:
    counts = [key for key in (architecture.experts, architecture.dense) if key]
    keys = [*READ, *(key.config for key in architecture.keys), *counts, *architecture.reads]
    keys += [*architecture.when, *architecture.fixed, *architecture.same, *architecture.flags]
    return list(dict.fromkeys(keys))


def _missing_rotary(config: Config, rope: Config) -> Config:
    """Returns the keys of the rotary settings `rope` that neither the config nor its own rotary settings give."""
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given_full, full = given.get(FULL) or given, rope.get(FULL) or rope
    if not given and full.get("rope_type", "default") != "default":
        return {"rope_parameters": rope}
    keys = ("rope_theta", "partial_rotary_factor")
    missing = {key: full[key] for key in keys if key in full and key not in given_full}
    theta = (rope.get(SLIDING) or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in (given.get(SLIDING) or {}):
        missing["rope_local_base_freq"] = theta
    return {key: value for key, value in missing.items() if config.get(key) is None}


def _config_class(architecture: Architecture, config: Config) -> Any:
    """Returns transformers' config class for `model_type` of config.json; for an unknown one, the architecture's."""
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    return CONFIG_MAPPING[model_type if model_type in CONFIG_MAPPING else architecture.model_type]


@functools.cache
def _class_defaults(config_class: Any) -> tuple[Config, Config]:
    """Returns the defaults of a config class, and its default rotary settings ({} if it has none)."""
    parameters = inspect.signature(config_class).parameters.values()
    values = {parameter.name: parameter.default for parameter in parameters}
    return values, dict(getattr(config_class(), "rope_parameters", None) or {})


def options_of(config: Config) -> Config:
    """Returns config.json as the options of transformers' config class, which adds keys to settings in place.

    transformers writes numbers that are not finite as `{"__float__": "Infinity"}`.
    """
    return {key: _with_floats(copy.deepcopy(config[key])) for key in config if key != "quantization_config"}


def _with_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return value


def _made(config_class: Any, config: Config) -> Any:
    """Returns the config that transformers makes of config.json: some classes compute defaults from other keys.

    It is that of an empty config.json if transformers refuses this one; no model can be made of it then.
    """
    options = {key: value for key, value in options_of(config).items() if key != "model_type"}
    try:
        return config_class(**options)
    except Exception:  # each class raises exceptions of its own
        return config_class()


def _value(made: Any, name: str) -> Any:
    """Returns a value of a config. An attribute that some blocks replace by their own cannot be asked for by name."""
    return vars(made)[name] if name in vars(made) else getattr(made, name)
