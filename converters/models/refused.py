"""Architectures that are refused, and why. `tools/models_table.py` makes a table of `docs/models.md` from this one."""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "transformers 5.23 has no such model, and the program runs transformers' own"


@dataclass(frozen=True)
class Refused:
    """An architecture that is refused.

    family   its usual name
    classes  its class names in `architectures` of config.json
    reason   what stands against it, as the end of a sentence
    """

    family: str
    classes: tuple[str, ...]
    reason: str


REFUSED = (
    Refused(
        "Phi-3.5 MoE",
        ("PhimoeForCausalLM",),
        "llama.cpp weighs its experts in another way than transformers, and its norms do not subtract the mean: the "
        "logits of a small random model differ by 0.54 at unit scale",
    ),
    Refused("Helium", ("HeliumForCausalLM",), "llama.cpp has no such architecture"),
    Refused("Step 3.5", ("Step3p5ForCausalLM",), UNKNOWN),
    Refused("Ling, Ring (Bailing MoE)", ("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"), UNKNOWN),
)


def refusal(names: list[str]) -> str | None:
    """Returns a sentence that says why a model is refused; None if no architecture of the names is in `REFUSED`.

    names   `architectures` of its config.json
    """
    for entry in REFUSED:
        if given := [name for name in names if name in entry.classes]:
            return f"{given[0]} ({entry.family}) is not supported: {entry.reason}."
    return None
