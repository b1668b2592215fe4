"""The table of architectures. One entry makes a family of models known to the pipeline, the planner and the converters.

The entries are in `families/`, one file for each maker. `tests/test_families.py` runs a small model of every entry in
llama.cpp and compares it with transformers. `tools/models_table.py` makes the table of `docs/models.md` from them.
"""

from __future__ import annotations

import difflib
from typing import Any

from lqexport.converters.models.architecture import CUT, Architecture, Config, Factor
from lqexport.converters.models.families.apertus import APERTUS
from lqexport.converters.models.families.arcee import AFMOE, ARCEE
from lqexport.converters.models.families.bert import BERT
from lqexport.converters.models.families.cohere import COHERE, COHERE2
from lqexport.converters.models.families.deepseek import (
    DEEPSEEK_V2,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V3_LITE,
    DEEPSEEK_V32,
    in_two,
)
from lqexport.converters.models.families.deepseek4 import DEEPSEEK_V4
from lqexport.converters.models.families.ernie import ERNIE, ERNIE_MOE, ERNIE_MOE_WITHOUT_SHARED
from lqexport.converters.models.families.exaone import EXAONE4, EXAONE_MOE
from lqexport.converters.models.families.falcon import FALCON, FALCON_7B, FALCON_H1
from lqexport.converters.models.families.gemma import (
    EMBEDDING_GEMMA,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GEMMA4_E,
    GEMMA4_MOE,
)
from lqexport.converters.models.families.gemma3n import GEMMA3N
from lqexport.converters.models.families.glm import (
    GLM,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GLM4_MOE_NORMED,
    GLM_DSA,
)
from lqexport.converters.models.families.gpt import GPT2, GPT_NEOX
from lqexport.converters.models.families.granite import (
    GRANITE,
    GRANITE_ATTENTION,
    GRANITE_HYBRID,
    GRANITE_HYBRID_MOE,
    GRANITE_MOE,
)
from lqexport.converters.models.families.hunyuan import HUNYUAN, HUNYUAN_MOE
from lqexport.converters.models.families.jamba import JAMBA, JAMBA_MOE
from lqexport.converters.models.families.lfm import LFM2, LFM2_MOE
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.llama4 import LLAMA4
from lqexport.converters.models.families.mamba import FALCON_MAMBA, MAMBA, MAMBA2
from lqexport.converters.models.families.mimo import MIMO2
from lqexport.converters.models.families.minimax import MINIMAX_M2
from lqexport.converters.models.families.mistral import MINISTRAL3, MISTRAL, MISTRAL4
from lqexport.converters.models.families.mixtral import MIXTRAL
from lqexport.converters.models.families.moonshot import KIMI_LINEAR
from lqexport.converters.models.families.nemotron import NEMOTRON, NEMOTRON_H, NEMOTRON_H_MOE
from lqexport.converters.models.families.olmo import OLMO2, OLMO3, OLMOE
from lqexport.converters.models.families.openai import GPT_OSS
from lqexport.converters.models.families.opt import OPT
from lqexport.converters.models.families.phi import PHI, PHI3
from lqexport.converters.models.families.qwen import (
    QWEN2,
    QWEN2_MOE,
    QWEN2_VL,
    QWEN3,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_VL,
    QWEN3_VL_MOE,
)
from lqexport.converters.models.families.rednote import DOTS1
from lqexport.converters.models.families.seed import SEED_OSS
from lqexport.converters.models.families.smollm import SMOLLM3
from lqexport.converters.models.families.stablelm import STABLELM
from lqexport.converters.models.families.starcoder import STARCODER2
from lqexport.converters.models.hf_defaults import default_of, filled_in
from lqexport.converters.models.refused import refusal
from lqexport.converters.models.text_parts import OTHER_TYPES, WITH_TEXT_PARTS, is_whole, text_part
from lqexport.errors import UserError, well_formed

LIST = "https://github.com/lqexport/lqexport/blob/main/docs/models.md"
"""The page with a table of all architectures."""

ARCHITECTURES = (
    LLAMA,
    MISTRAL,
    MINISTRAL3,
    MISTRAL4,
    QWEN2,
    QWEN2_VL,
    QWEN3,
    QWEN3_VL,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3N,
    GEMMA4,
    GEMMA4_E,
    GEMMA4_MOE,
    PHI,
    PHI3,
    MIXTRAL,
    QWEN3_MOE,
    QWEN3_VL_MOE,
    DEEPSEEK_V3_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V2,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    KIMI_LINEAR,
    QWEN2_MOE,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    OLMOE,
    GLM4_MOE,
    GLM4_MOE_NORMED,
    GLM4_MOE_LITE,
    GLM_DSA,
    MINIMAX_M2,
    MIMO2,
    DOTS1,
    EXAONE_MOE,
    AFMOE,
    GPT_OSS,
    LLAMA4,
    ERNIE_MOE_WITHOUT_SHARED,
    ERNIE_MOE,
    HUNYUAN_MOE,
    GRANITE_MOE,
    GLM,
    GLM4,
    SEED_OSS,
    ERNIE,
    HUNYUAN,
    ARCEE,
    APERTUS,
    OLMO2,
    OLMO3,
    SMOLLM3,
    GRANITE,
    STARCODER2,
    COHERE,
    COHERE2,
    EXAONE4,
    STABLELM,
    NEMOTRON,
    FALCON,
    FALCON_7B,
    GPT_NEOX,
    GPT2,
    LFM2,
    LFM2_MOE,
    GRANITE_ATTENTION,
    GRANITE_HYBRID,
    GRANITE_HYBRID_MOE,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
    FALCON_H1,
    MAMBA,
    FALCON_MAMBA,
    MAMBA2,
    JAMBA,
    JAMBA_MOE,
    OPT,
    BERT,
    EMBEDDING_GEMMA,
)


def find_architecture(config: Config) -> Architecture | None:
    """Returns the entry for a config.json, with `*` still in the names of experts.

    Returns None where config.json names an architecture that the table does not have.
    """
    names = config.get("architectures") or []
    if any(name in WITH_TEXT_PARTS for name in names):
        model_type = str((config.get("text_config") or {}).get("model_type"))
        named = [entry for entry in ARCHITECTURES if entry.model_type == OTHER_TYPES.get(model_type, model_type)]
    else:
        named = [entry for entry in ARCHITECTURES if any(name in entry.classes for name in names)]
    entry = next((entry for entry in named if _is_told_by(entry, config.get("text_config") or config)), None)
    return in_two(entry) if entry and entry.cuttable and config.get(CUT) else entry


def entries_of_gguf(name: str) -> list[Architecture]:
    """Returns the entries for a `general.architecture` of GGUF files, those with `kv_b_proj` cut in two last."""
    named = [entry for entry in ARCHITECTURES if entry.gguf is not None and entry.gguf == name]
    return named + [in_two(entry) for entry in named if entry.cuttable]


def _is_told_by(entry: Architecture, config: Config) -> bool:
    """Returns whether a config.json that names the entry's class has the values that tell the entry from others."""
    values = {key: config[key] if key in config else default_of(entry, config, key) for key in entry.when}
    return all(value in entry.when[key] for key, value in values.items()) and entry.told(config)


def architecture_of(config: Config) -> Architecture:
    """Returns the entry for a config.json, expanded to its number of experts.

    Raises UserError if it names an architecture that is not in the table, or if the architecture has experts and
    config.json does not give their number.
    """
    if (architecture := find_architecture(config)) is None:
        given = [str(name) for name in config.get("architectures") or ()]
        if (reason := refusal(given)) is not None:
            raise UserError(reason)
        raise UserError(_unknown(given))
    of_each_model = (architecture.experts, architecture.only, architecture.borrows, architecture.predictor)
    if not any(of_each_model):
        return architecture
    config = normalized(config)
    count, leading = (config.get(key, 0) if key else 0 for key in (architecture.experts, architecture.dense))
    if architecture.experts and (not isinstance(count, int) or not 1 <= count <= 4096):
        raise UserError(f"config.json gives no {architecture.experts}.")
    if not isinstance(leading, int) or leading < 0:
        raise UserError(f"config.json gives no {architecture.dense}.")
    return architecture.expanded(
        count, leading, _values_per_block(architecture, config), _first_borrower(architecture, config),
        config.get("num_hidden_layers"),
    )  # fmt: skip


def _first_borrower(architecture: Architecture, config: Config) -> int | None:
    """Returns the number of the first block that uses the keys and values of an earlier one; None if there is none.

    Raises UserError if config.json gives no such number, or if no block has keys and values of its own.
    """
    if architecture.borrows is None:
        return None
    count, layers = config.get(architecture.borrows) or 0, config.get("num_hidden_layers")
    if not isinstance(count, int) or not isinstance(layers, int) or not 0 <= count < layers:
        raise UserError(f"config.json: {architecture.borrows} must be a number below that of the blocks, not {count}.")
    return layers - count if count else None


def _values_per_block(architecture: Architecture, config: Config) -> dict[str, tuple[Any, ...]]:
    """Returns the keys of `only` with their value for each block.

    Raises UserError if config.json does not give one value for each block.
    """
    keys, layers = {key for key, _ in architecture.only.values()}, config.get("num_hidden_layers")
    for key in keys:
        if not isinstance(config.get(key), list) or len(config[key]) != layers:
            raise UserError(f"config.json gives no {key} with one value for each of {layers} blocks.")
    return {key: tuple(config[key]) for key in keys}


def normalized(config: Config) -> Config:
    """Returns config.json under the usual names of its keys, with transformers' defaults of keys that it leaves out.

    For a model with images, this is the config of its text part. Raises UserError for values of other types than they
    must have.
    """
    if (architecture := find_architecture(config)) is None:
        return config
    with well_formed("config.json"):
        complete = _complete(architecture, config)
        return complete | architecture.derived(complete)


def _unknown(given: list[str]) -> str:
    """Returns the message about class names that no entry has: which ones are like them, and where all are listed."""
    known = list(dict.fromkeys(name for entry in ARCHITECTURES for name in entry.classes))
    near = [match for name in given for match in difflib.get_close_matches(name, known, 3, 0.7)]
    like = f" Known ones like it: {', '.join(near)}." if near else ""
    names = ", ".join(given) or "(config.json names none)"
    return f"Unknown architecture {names}.{like} All {len(known)} known ones are in {LIST}."


def folded_factors(config: Config) -> dict[str, Factor]:
    """Returns `folded` of a config.json as a checkpoint has it: {} after `normalized`, or factors of 1."""
    architecture = find_architecture(config)
    return architecture.folded(_complete(architecture, config)) if architecture else {}


def _complete(architecture: Architecture, config: Config) -> Config:
    if is_whole(config):
        config = text_part(config, architecture)
    given = {usual: config[older] for older, usual in architecture.former.items() if config.get(older) is not None}
    config = {key: value for key, value in config.items() if key not in architecture.former} | given
    aliases = architecture.aliases.items()
    usual = {name: config[alias] for alias, name in aliases if config.get(alias) is not None and name not in config}
    known = {"model_type": architecture.model_type} if config.get("model_type") in (None, *OTHER_TYPES) else {}
    complete = filled_in(architecture, usual | config | known)
    if isinstance(widths := complete.get("intermediate_size"), list) and len(set(widths)) == 1:
        complete = complete | {"intermediate_size": widths[0]}  # Gemma 3n has it for each block
    return complete
