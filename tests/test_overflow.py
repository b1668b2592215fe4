"""Weights that are finite but too large: for the type that stores them, or for the sums over inputs that they cause."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from lqexport.errors import UserError
from lqexport.formats.codec import PlainCodec
from lqexport.formats.gptq import GPTQ
from lqexport.formats.registry import codec_named, names
from lqexport.grids.reach import reach
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear
from lqexport.solver.rounded_tensor import round_tensor

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
GRIDS = [
    name
    for name in (*names("gguf"), *names("native"), "mlx:4-g64", "mlx:4-g64-f16", *GPTQ, "exl2:4g128x1+2g128x1")
    if not isinstance(codec_named(name), PlainCodec)
]


def spoiled(model: Path, folder: Path, name: str, weight: float) -> str:
    """Copies a model in bfloat16, with one weight of the tensor `name` replaced. Returns the folder."""
    shutil.copytree(model, folder)
    state = {key: tensor.bfloat16() for key, tensor in load_file(folder / "model.safetensors").items()}
    state[name].view(-1)[3] = weight
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("target", "name"),
    [("gguf:F16", EMBEDDING), ("native:table-4", EMBEDDING), ("gptq:4-g32", NORM), ("exl2", NORM)],
)
def test_a_weight_too_large_for_float16_is_named(target: str, name: str, smaller_model: Path, tmp_path: Path) -> None:
    bits = 4.5 if target == "exl2" else None
    recipe = Recipe(spoiled(smaller_model, tmp_path / "model", name, 1e5), target, method="rtn", bits=bits)
    with pytest.raises(UserError, match=rf"^{name} has a weight of 99840, .* too large for gguf:F16: give it BF16"):
        quantize(recipe, tmp_path / "out", device="cpu")


def test_what_the_message_advises_works(smaller_model: Path, tmp_path: Path) -> None:
    source = spoiled(smaller_model, tmp_path / "model", EMBEDDING, 1e5)
    quantize(Recipe(source, "gguf:F16", embedding_type="BF16"), tmp_path / "out", device="cpu")


@pytest.mark.parametrize(
    ("target", "method"),
    [("gguf:Q4_0", "lean"), ("exl2", "lean"), ("gguf:MXFP4", "rtn"), ("native:table-4", "rtn"), ("gptq:4-g32", "rtn")],
)
def test_a_linear_too_large_for_its_grid_is_named(
    target: str, method: Literal["rtn", "lean"], smaller_model: Path, tmp_path: Path
) -> None:
    source, bits = spoiled(smaller_model, tmp_path / "model", UP, 1e20), 4.5 if target == "exl2" else None
    recipe = Recipe(source, target, method=method, bits=bits, samples=2, sequence_length=32, tune=0)
    with pytest.raises(UserError, match=rf"^{UP} has a weight of [\d.]+e\+1\d, which is too large for "):
        quantize(recipe, tmp_path / "out", device="cpu")


def test_an_embedding_too_large_for_its_grid_is_named(smaller_model: Path, tmp_path: Path) -> None:
    source = spoiled(smaller_model, tmp_path / "model", EMBEDDING, 1e20)
    with pytest.raises(UserError, match=rf"^{EMBEDDING} has a weight of 9\.97277e\+19, which is too large for gguf"):
        quantize(Recipe(source, "gguf:Q8_0", method="rtn"), tmp_path / "out", device="cpu")


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_holds_what_is_not_refused(name: str) -> None:
    """A weight at the end of a codec's reach is stored as well as any other; one beyond it is refused."""
    settings = Recipe("model", "gguf:Q4_0", method="rtn").solver_settings

    def error(weight: float) -> float:
        weights = torch.zeros(32, 256)
        weights[3, 40] = weight
        return solve_linear("x", weights, None, name, settings).facts["weight_error"]

    for end in reach(codec_named(name)):
        assert error(end) <= 1.5 * error(end / 16) + 1e-3
        with pytest.raises(UserError, match=rf"^x has a weight of .* too large for {re.escape(name)}:"):
            error(1.01 * end)


def test_the_largest_weight_is_named_though_another_part_of_the_tensor_is_rounded_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lqexport.solver.rounded_tensor.ROUND_CHUNK", 8)
    weights = torch.zeros(4, 8)
    weights[1, 2], weights[3, 5] = 7e4, -2e5
    with pytest.raises(UserError, match=r"x has a weight of -200000, which is too large for gguf:F16"):
        round_tensor("x", weights, "gguf:F16")


def test_inputs_that_overflow_are_not_called_a_broken_weight() -> None:
    """The weights are finite, but the inputs' second moments are not: a tensor before the linear is to blame."""
    settings = Recipe("model", "gguf:Q4_0").solver_settings
    hessian = torch.eye(32)
    hessian[3, 3] = torch.inf
    with pytest.raises(UserError, match=r"^x: the inputs of this linear are not finite") as caught:
        solve_linear("x", torch.ones(4, 32), hessian, "gguf:Q4_0", settings)
    assert "weights in the source" not in str(caught.value)


def test_a_run_over_enormous_weights_says_whose_inputs_overflow(smaller_model: Path, tmp_path: Path) -> None:
    source = spoiled(smaller_model, tmp_path / "model", UP, 1e30)
    recipe = Recipe(source, "gguf:Q4_0", types=[f"{UP}=F32"], samples=2, sequence_length=32, tune=0, asymmetric=True)
    with pytest.raises(UserError, match=r"^model\.layers\.0\.mlp\.down_proj\.weight: the inputs of this linear"):
        quantize(recipe, tmp_path / "out", device="cpu")
