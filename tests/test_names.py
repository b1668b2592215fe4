"""Names of targets and types as users type them, and the one spelling in which a recipe keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import lqexport
from lqexport.converters.targets import targets
from lqexport.errors import UserError
from lqexport.formats.exl3 import EXL3
from lqexport.formats.gptq import GPTQ
from lqexport.formats.registry import names
from lqexport.recipe import Recipe
from lqexport.target import Target, did_you_mean, full_name, spelled


@pytest.mark.parametrize(
    "name", [*targets(), *names(), *GPTQ, *EXL3, "gguf:auto", "exl2", "exl2:8g32x1+4g128x5", "exl3"]
)
def test_names_that_are_known_keep_their_spelling(name: str) -> None:
    """run.json holds them, and another spelling would be another run."""
    assert spelled(name) == name
    assert str(Target.parse(name)) == name
    if name.startswith("gguf:"):
        short = name.removeprefix("gguf:")
        assert spelled(short) == short
        assert full_name(short) == name


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("q4_k_m", "gguf:Q4_K_M"),
        ("Q4_K_M", "gguf:Q4_K_M"),
        ("Q4KM", "gguf:Q4_K_M"),
        ("q4-k-m", "gguf:Q4_K_M"),
        ("mxfp4", "gguf:MXFP4"),
        ("mxfp4moe", "gguf:MXFP4_MOE"),
        ("gguf:q4_k_m", "gguf:Q4_K_M"),
        (" GGUF:Q4_K_M ", "gguf:Q4_K_M"),
        ("q2_k", "gguf:Q2_K"),
        ("q8_0", "gguf:Q8_0"),
        ("iq4xs", "gguf:IQ4_XS"),
        ("iq2xxsmix", "gguf:IQ2_XXS_MIX"),
        ("iq4_nl-mix", "gguf:IQ4_NL_MIX"),
        ("iq3m", "gguf:IQ3_M"),
        ("tq2_0", "gguf:TQ2_0"),
        ("nvfp4", "gguf:NVFP4"),
        ("bf16", "gguf:BF16"),
        ("Auto", "gguf:auto"),
        ("EXL2", "exl2"),
        ("Native:Table-3", "native:table-3"),
        ("GPTQ:4-G128-sym", "gptq:4-g128-sym"),
    ],
)
def test_targets_as_llama_cpps_users_type_them(typed: str, name: str) -> None:
    assert str(Target.parse(typed)) == name


@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_every_target_is_known_in_any_case(case: type[str]) -> None:
    for name in [*targets(), *GPTQ, *EXL3, "gguf:auto", "exl2", "exl3"]:
        assert str(Target.parse(case(name))) == name


def test_a_recipe_keeps_one_spelling_of_every_name() -> None:
    typed = Recipe(
        "model", "q4km", embedding_type="q6_k", output_type="GGUF:q6k", factors="bf16", types=["*.Down=q5_k", "a=F16"]
    )
    spelt = Recipe(
        "model", "gguf:Q4_K_M", embedding_type="Q6_K", output_type="gguf:Q6_K", factors="BF16",
        types=["*.Down=Q5_K", "a=F16"],
    )  # fmt: skip
    assert dataclasses.asdict(typed) == dataclasses.asdict(spelt)
    sizes = {"q4_k_m": "Q4_K_M", "4.25bpw": "4.25bpw", "3.9GB": "3.9GB", "gguf:q4_k_m": "gguf:Q4_K_M"}
    assert [Recipe("model", "AUTO", size=size).size for size in sizes] == list(sizes.values())


def test_a_plan_of_typed_names_is_that_of_the_spelt_ones(tiny_model: Path, tmp_path: Path) -> None:
    typed = Recipe(str(tiny_model), "q4_k_m", types=["*.down_proj.weight=q5_k"], embedding_type="q8_0")
    spelt = Recipe(str(tiny_model), "gguf:Q4_K_M", types=["*.down_proj.weight=Q5_K"], embedding_type="Q8_0")
    assert lqexport.preview(typed, tmp_path).tensors == lqexport.preview(spelt, tmp_path).tensors


@pytest.mark.parametrize(
    "use", [{"target": "q2_0"}, {"types": ["*.down_proj.weight=Q2_0"]}, {"embedding_type": "Q2_0"}]
)
def test_a_type_that_the_gguf_package_does_not_know_is_refused(
    use: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"^Q2_0( for .+)? cannot be chosen: the gguf package does not know it yet\. .+"
    ):
        lqexport.preview(Recipe(str(tiny_model), **({"target": "Q8_0"} | use)), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("Q4_K_X", "gguf:Q4_K_S"), ("fp16", "gguf:F16"), ("IQ4_XXS", "gguf:IQ4_XS"), ("Q4", "gguf:Q4_K")],
)
def test_an_unknown_name_is_answered_with_three_at_most(wrong: str, near: str) -> None:
    said = did_you_mean(wrong, [*targets(), *GPTQ])
    assert near in said
    assert 1 <= said.count(":") <= 3
