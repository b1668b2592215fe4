"""Models with experts: experts that no token reaches, excluded options, and one type for all experts of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_cases import EXPERTS, SIZES, config_and_shapes, make_model, make_tokenizer
from family_cases import texts as texts
from transformers import AutoModelForCausalLM

from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.target import Target


def test_experts_that_no_token_reaches(tmp_path: Path, texts: tuple[str, str]) -> None:
    """All experts have equal router scores, so every token goes to the same two of eight.

    The other experts are solved as if all inputs had the same weight.
    """
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES | EXPERTS | {"num_experts": 8, "head_dim": 32, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config)
    model.model.layers[0].mlp.gate.weight.data.zero_()
    model.save_pretrained(tmp_path / "hf")
    make_tokenizer("gpt-2", tmp_path).save_pretrained(tmp_path / "hf")
    for prefix, moments in (("full", "guided"), ("quantized", "normalized")):
        recipe = Recipe(str(tmp_path / "hf"), "gguf:Q4_0", calibration=texts[0], samples=2, sequence_length=64, tune=0,
                        descent=1, prefix=prefix, moments=moments)  # fmt: skip
        report = quantize(recipe, tmp_path / prefix)
        errors = {t["name"]: t["relative_error"] for t in report["tensors"] if ".experts." in t["name"]}
        assert len(errors) == 24
        assert max(errors.values()) < 0.05


@pytest.mark.parametrize(
    "options", [{"target": "gguf:auto", "size": "5bpw"}, {"asymmetric": True, "prefix": "quantized"}]
)
def test_what_experts_do_not_allow_yet(tmp_path: Path, options: dict[str, Any]) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "hf")
    options = {"target": "gguf:Q4_K", "moments": "guided" if "size" in options else "normalized"} | options
    with pytest.raises(UserError, match="cannot be used for experts"):
        quantize(Recipe(str(tmp_path / "hf"), **options), tmp_path / "out")


def test_experts_of_a_block_share_their_type() -> None:
    config, shapes = config_and_shapes("mixtral")
    everything = plan(Target.parse("gguf:Q8_0"), config, shapes, types={"*.experts.*.down_proj.weight": "gguf:Q4_0"})
    assert {tensor.codec_name for tensor in everything if "down_proj" in tensor.name} == {"gguf:Q4_0"}
    with pytest.raises(UserError, match="experts of a block in one type"):
        plan(Target.parse("gguf:Q8_0"), config, shapes, types={"*.experts.1.down_proj.weight": "gguf:Q4_0"})
