"""Smoothing: the model stays the same to the bit, its norms tell the scales, and it rounds better."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lqexport.calibration.collect import input_magnitudes
from lqexport.converters.gguf import writer as gguf
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.families.mixtral import MIXTRAL
from lqexport.errors import UserError
from lqexport.models.blocks import BlockModel
from lqexport.models.smoothing import Smoothed, column_scales, pairs, scales_between
from lqexport.models.source import open_source
from lqexport.pipeline import input_sizes as sizes
from lqexport.pipeline import solve_model
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact, SolvedModel
from lqexport.verification.card import SMOOTHED, card
from lqexport.verification.verifying import verify

TOKENS = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(3))
ATTENTION = "model.layers.0.input_layernorm"
MLP = "model.layers.0.mlp"
LOUD = 7
"""Index of the column that enters attention, and of the one that enters down_proj, 128 times as large as others."""


@pytest.fixture(scope="module")
def loud_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with LOUD columns, and the weights behind these columns smaller by as much."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{ATTENTION}.weight"][LOUD] *= 128
    for name in ("q", "k", "v"):
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"][:, LOUD] /= 128
    tensors[f"{MLP}.up_proj.weight"][LOUD] *= 128
    tensors[f"{MLP}.down_proj.weight"][:, LOUD] /= 128
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def options(text: Path) -> dict[str, Any]:
    return {"calibration": str(text), "samples": 4, "sequence_length": 32, "descent": 1, "tune": 0}


def logits(model: BlockModel) -> torch.Tensor:
    hidden = model.start(TOKENS)
    for _, block in model.blocks():
        hidden = model.run(block, hidden)
    return model.logits(hidden)


def test_the_model_stays_the_same_to_the_bit(tiny_model: Path) -> None:
    source = open_source(str(tiny_model))
    draw = torch.Generator().manual_seed(1)
    sizes = {pair: source.shape(f"{pair.giver}.weight")[0] for pair in pairs(LLAMA, 2)}
    assert sorted(sizes.values()) == [256] * 4 + [512] * 2  # norms, and rows of up_proj
    scales = {pair: torch.randint(-3, 4, (size,), generator=draw).float().exp2() for pair, size in sizes.items()}
    smoothed = Smoothed(source, scales)
    assert not torch.equal(smoothed.read(f"{ATTENTION}.weight"), source.read(f"{ATTENTION}.weight").float())
    assert torch.equal(logits(BlockModel(smoothed)), logits(BlockModel(source)))
    recovered = scales_between(source, smoothed)
    assert recovered.keys() == scales.keys()
    assert all(torch.equal(recovered[pair], scales[pair]) for pair in scales)


def test_scales_are_a_power_of_the_inputs_sizes() -> None:
    inputs = torch.ones(1000)
    inputs[:4] = torch.tensor([2.0**20, 2.0**9, 0.0, 2.0**-10])
    assert column_scales(inputs)[:5].tolist() == [16, 4, 1, 0.25, 1]
    assert column_scales(torch.zeros(3)).tolist() == [1, 1, 1]


def test_columns_end_up_alike(loud_model: Path, text: Path, tmp_path: Path) -> None:
    """In the file, the inputs and the weights of the loud column are nearer to those of the other columns."""
    quantize(Recipe(str(loud_model), "gguf:Q8_0", **options(text)), tmp_path / "out")
    artifact = Artifact(tmp_path / "out")
    solved = SolvedModel(artifact, artifact.config(), list(artifact.manifest()))
    norm = solved.read(f"{ATTENTION}.weight").abs()
    query = solved.read("model.layers.0.self_attn.q_proj.weight").norm(dim=0)
    assert float(norm[LOUD] / norm.median()) <= 128 / 2
    assert float(query[LOUD] / query.median()) > 1.5 / 128
    by_giver = {pair.giver: scales for pair, scales in scales_between(open_source(str(loud_model)), solved).items()}
    for giver in (ATTENTION, f"{MLP}.up_proj"):
        assert by_giver[giver][LOUD] >= 2 * by_giver[giver].median()


@pytest.mark.parametrize(
    "more", [{}, {"rank": 8, "scaling": "l2qer", "smooth": False, "target": "native:affine-4-g64"}]
)
def test_a_resumed_run_does_not_measure_inputs_again(
    more: dict[str, Any], loud_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Recipe(str(loud_model), **({"target": "gguf:Q8_0"} | options(text) | more))
    whole, measured = tmp_path / "whole", []

    def counted(*arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        measured.append(1)
        return input_magnitudes(*arguments, **named)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sizes, "input_magnitudes", counted)
    quantize(chosen, whole)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(solve_model, "_begin_solving", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(chosen, tmp_path / "out")
    quantize(chosen, tmp_path / "out")
    assert len(measured) == 2
    for tensor in (whole / "tensors").iterdir():
        assert (tmp_path / "out" / "tensors" / tensor.name).read_bytes() == tensor.read_bytes()


def test_no_scales_are_read_off_rows_where_norms_have_none(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    """Rounding to few bits also changes the length of rows; that must not be read as a scale."""
    quantize(Recipe(str(tiny_model), "gguf:Q2_K", **options(text)), tmp_path / "out")
    artifact = Artifact(tmp_path / "out")
    solved = SolvedModel(artifact, artifact.config(), list(artifact.manifest()))
    assert scales_between(open_source(str(tiny_model)), solved) == {}


@pytest.mark.parametrize(("target", "error"), [("gguf:Q8_0", 1e-3), ("gguf:Q4_0", 0.02)])
def test_verify_compares_with_the_smoothed_weights(
    target: str, error: float, loud_model: Path, text: Path, tmp_path: Path
) -> None:
    quantize(Recipe(str(loud_model), target, **options(text)), tmp_path / "out")
    gguf.write(Artifact(tmp_path / "out"), tmp_path / "model.gguf")
    result = verify(tmp_path / "model.gguf", str(loud_model), text=str(text), windows=1, artifact=tmp_path / "out")
    assert result.failed == []
    assert all(tensor.weight_error < error for tensor in result.tensors)
    assert result.evaluations[0].kl < error
    assert result.smoothed >= 1
    assert SMOOTHED in card(result)


def test_what_nothing_rounds_is_not_smoothed(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    for target, more in (("native:affine-4-g64", {}), ("gguf:F16", {}), ("gguf:Q4_0", {"smooth": False})):
        out = tmp_path / target.replace(":", "-")
        quantize(Recipe(str(tiny_model), target, **options(text), **more), out)
        norm = SolvedModel(Artifact(out), Artifact(out).config(), [f"{ATTENTION}.weight"]).read(f"{ATTENTION}.weight")
        assert torch.equal(norm, open_source(str(tiny_model)).read(f"{ATTENTION}.weight").float())


def test_experts_have_no_pairs_and_rounding_no_calibration() -> None:
    assert pairs(MIXTRAL.expanded(4), 2) == []
    with pytest.raises(UserError, match="Smoothing takes the size of inputs"):
        Recipe("any", "gguf:Q4_0", method="rtn", smooth=True)
