"""The models that ExLlamaV3 1.6.5 runs as transformers does, and how its names and settings differ from ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lqexport.converters.folders.pieces import Naming
from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.engine_checks import check_fixed, check_without_windows
from lqexport.converters.models.families.mixtral import PUBLISHED_NAMES
from lqexport.converters.models.families.phi import SPLIT
from lqexport.converters.models.rope import longrope_attention, rope_settings, window_theta
from lqexport.converters.models.windows import window
from lqexport.errors import UserError, with_advice
from lqexport.formats.trellis import BLOCK

MOST_INTERMEDIATE = 55296
"""The widest MLP that ExLlamaV3 does not cut into slices."""
SCALED = ("dynamic", "linear", "llama3", "yarn")
"""The types of rope scaling that ExLlamaV3 computes as transformers does; within the context `dynamic` changes nothing.
"""


@dataclass(frozen=True)
class ExLlamaV3:
    """The rules by which ExLlamaV3 loads an architecture (exllamav3/architecture/).

    naming    its names
    called    the class name that config.json must have in `architectures`, where it is not our first one
    keys      key of config.json that it reads -> the usual key
    rope      the types of rope scaling that it computes as transformers does
    windows   how many tokens more than config.json says a sliding window has; None where it ignores windows
    """

    naming: Naming = field(default_factory=Naming)
    called: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    rope: tuple[str, ...] = SCALED
    windows: int | None = None


ROUTER_BIAS = {r"\.e_score_correction_bias$": ".gate.e_score_correction_bias"}
LFM2 = {rf"(experts\.\d+)\.{ours}\.": rf"\1.{theirs}." for ours, theirs in
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items()}  # fmt: skip
RULES: dict[str, ExLlamaV3] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3", "arcee"), ExLlamaV3()),
    **dict.fromkeys(("cohere", "dots1", "glm4_moe", "lfm2", "ministral3"), ExLlamaV3()),
    **dict.fromkeys(("afmoe", "cohere2", "olmo3"), ExLlamaV3(windows=1)),
    "qwen3_moe": ExLlamaV3(keys={"num_experts": "num_local_experts"}),
    "ernie4_5": ExLlamaV3(called="Ernie4_5_ForCausalLM"),
    "gpt_oss": ExLlamaV3(windows=0),
    "lfm2_moe": ExLlamaV3(Naming(renamed=LFM2)),
    "minimax_m2": ExLlamaV3(Naming(renamed=PUBLISHED_NAMES | ROUTER_BIAS)),
    "glm4": ExLlamaV3(Naming({"mlp.gate_up_proj": SPLIT["mlp.gate_up_proj"]})),
    "gemma2": ExLlamaV3(keys={"sliding_window_size": "sliding_window"}, windows=0),
    "mixtral": ExLlamaV3(Naming(renamed=PUBLISHED_NAMES)),
    "phi3": ExLlamaV3(Naming(SPLIT), rope=("longrope",)),
}
"""`model_type` of the models whose logits in ExLlamaV3 were those of transformers (tools/exl3_models.py) -> its rules.
"""


def rules_of(config: Config) -> ExLlamaV3:
    """Returns ExLlamaV3's rules for a config.json; for a model that it does not run, the rules of Llama."""
    return RULES.get(str(config.get("model_type")), ExLlamaV3())


def check_supported(architecture: Architecture, config: Config) -> None:
    """Raises UserError if ExLlamaV3 lacks the architecture, or computes it in another way than config.json says."""
    name, model_type = architecture.classes[0], str(config.get("model_type"))
    with with_advice("Choose another target."):
        if model_type not in RULES:
            raise UserError(
                f"EXL3 folders of {name} ({model_type}) are not written: ExLlamaV3 1.6.5 does not run it, or not as "
                "transformers does."
            )
        rules = RULES[model_type]
        check_fixed("ExLlamaV3", architecture, config)
        _check_rope(name, config, rules)
        if rules.windows is None:
            check_without_windows("ExLlamaV3", architecture, config)
        if not architecture.experts and config.get("intermediate_size", 0) > MOST_INTERMEDIATE:
            raise UserError(
                f"ExLlamaV3 cuts MLPs of more than {MOST_INTERMEDIATE} columns into slices, which are not written; "
                f"this one has {config['intermediate_size']}."
            )


def _check_rope(name: str, config: Config, rules: ExLlamaV3) -> None:
    rope = rope_settings(config)
    rope_type, context = rope["rope_type"], config.get("max_position_embeddings") or 0
    if rope_type not in ("default", *rules.rope):
        raise UserError(f"ExLlamaV3 has no rope scaling of type {rope_type!r} for {name}.")
    if window_theta(config) not in (None, rope["rope_theta"]):
        raise UserError(f"ExLlamaV3 rotates all blocks of {name} with one rope_theta, and config.json has two.")
    original = rope.get("original_max_position_embeddings") or context
    if rope_type == "yarn" and context > original and not math.isclose(rope["factor"], context / original):
        raise UserError(
            f"ExLlamaV3 computes yarn with the factor max_position_embeddings / original_max_position_embeddings, "
            f"{context / original:g}, and config.json has {rope['factor']:g}."
        )
    if rope_type == "longrope":
        expected = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
        if not math.isclose(longrope_attention(config), expected):
            raise UserError("ExLlamaV3 computes longrope without attention_factor and factor of config.json.")


def warnings_of(architecture: Architecture, config: Config) -> list[str]:
    """Returns what ExLlamaV3 does otherwise with a folder of the model.

    Raises UserError as `check_supported` does.
    """
    check_supported(architecture, config)
    return [*_cannot_run(architecture, config), *_wider_windows(config)]


def _cannot_run(architecture: Architecture, config: Config) -> list[str]:
    """Returns a warning if ExLlamaV3 loads the model and cannot run it; else [].

    A gated MLP adds its padded output to hidden states that are not padded (exllamav3/modules/mlp.py).
    """
    hidden = int(config["hidden_size"])
    gated = any(module.endswith(("mlp.gate_proj", "mlp.gate_up_proj")) for module in architecture.gguf_block)
    if hidden % BLOCK == 0 or not gated:
        return []
    return [
        f"ExLlamaV3 1.6.5 loads models whose hidden_size is no multiple of {BLOCK}, and stops when it runs them; "
        f"GPTQModel does not load them. This one's is {hidden}."
    ]


def _wider_windows(config: Config) -> list[str]:
    """Returns a warning if a sliding window has more tokens in ExLlamaV3; else []."""
    narrow, more = window(config), rules_of(config).windows
    if narrow is None or not more:
        return []
    return [f"ExLlamaV3 1.6.5 computes sliding windows of {narrow + more} tokens, and transformers of {narrow}."]
