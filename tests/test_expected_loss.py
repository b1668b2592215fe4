"""Right files lose as much as their types should cost, and the sentences about others have the figures.

`test_wrong_files.py` has the wrong files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from spoiled_files import gguf_file, save_sharp
from torch import Tensor
from wrong_files import GATE, UP, swapped

from lqexport.calibration.texts import read_text
from lqexport.formats.gptq import GPTQ
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax
from lqexport.grids.fit_sections import fit_sections
from lqexport.grids.rounding import rounded_like
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.verification.blame import by_position
from lqexport.verification.expected_loss import engine_rounding
from lqexport.verification.limits import check_limits, parts_above
from lqexport.verification.result import Part, TensorCheck
from lqexport.verification.settings import different_settings
from lqexport.verification.verifying import verify


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a small model of a kind, or of a wider one whose kind ends in -wide."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_sharp(
                folder / kind, kind.removesuffix("-wide"), tiny_model, 256 if "wide" in kind else 128
            )
        return made[kind]

    return model


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text("python-heldout").content[:12_000], encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("target", ["F16", "BF16", "Q8_0", "Q6_K", "Q4_0", "Q2_K"])
def test_a_right_file_passes(target: str, models: Callable[[str], Path], heldout: str, tmp_path: Path) -> None:
    model = models("llama-wide")
    result = verify(gguf_file(model, tmp_path, f"gguf:{target}"), str(model), text=heldout, windows=2)
    assert (result.failed, result.causes) == ([], [])
    if target == "F16":
        assert (result.evaluations[0].kl, result.expected) == (0, [])
    else:
        (loss,) = result.expected
        assert loss.measured == pytest.approx(loss.expected, rel=1e-3)
        assert [part.error for part in loss.parts] == pytest.approx([part.expected for part in loss.parts], rel=1e-3)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("gguf:Q4_0", {}),
        ("gguf:Q8_0", {"method": "rtn"}),
        ("native:table-2", {"method": "rtn"}),
        ("exl2", {"bits": 3.0, "method": "rtn"}),
    ],
    ids=str,
)
def test_what_quantize_makes_passes(
    target: str, options: dict[str, object], models: Callable[[str], Path], heldout: str, tmp_path: Path
) -> None:
    recipe = Recipe(str(models("llama")), target, samples=4, sequence_length=128, tune=0, descent=1, **options)
    quantize(recipe, tmp_path / "out", device="cpu")
    result = verify(tmp_path / "out", str(models("llama")), text=heldout, windows=2)
    (loss,) = result.expected
    assert (result.failed, result.causes) == ([], [])
    assert 0.1 * loss.expected < loss.measured < 1.2 * loss.expected


def test_the_sentence_has_both_figures_and_the_limit_can_be_lifted(
    models: Callable[[str], Path], heldout: str, tmp_path: Path
) -> None:
    path = gguf_file(models("llama"), tmp_path, "gguf:Q8_0", swapped(GATE, UP))
    result = verify(path, str(models("llama")), text=heldout, windows=2)
    (loss,) = result.expected
    assert f"first 2 windows is {loss.measured:.4g}, above 3 times the {loss.expected:.4g}" in result.failed[0]
    lifted = dataclasses.replace(result, limits={"max_over_expected": 1e6}, failed=[], tensors=[])
    check_limits(lifted)
    assert lifted.failed == []
    without = verify(path, str(models("llama")), text=heldout, windows=2, max_over_expected=None)
    assert (without.failed, without.expected, without.causes) == ([], [], [])


@pytest.mark.parametrize("codec_name", ["gguf:F16", "gguf:Q4_0", "gguf:Q4_K", "native:table-3"])
def test_the_rule_of_the_stored_grid_is_found(codec_name: str) -> None:
    weights = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    codec = codec_named(codec_name)
    if codec_name == "gguf:F16":
        assert torch.equal(rounded_like(codec_name, {}, weights), weights.half().float())
        return
    grid = minmax(codec, weights)
    planes = codec.encode(grid.numpy(), grid.nearest(weights).numpy())
    assert torch.equal(rounded_like(codec_name, planes, weights), grid.values(grid.nearest(weights)))
    other = rounded_like(codec_name, codec.encode(grid.numpy(), grid.nearest(weights).numpy()), 2 * weights)
    assert float((other - 2 * weights).norm()) < 2 * float((grid.values(grid.nearest(weights)) - weights).norm())


def test_a_layout_with_columns_first_is_fitted_in_its_own_order() -> None:
    """A fitted grid of GPTQ's layout is not the min-max grid, so a fitted grid is taken."""
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    codec = GPTQ["gptq:4-g128"]
    sections = fit_sections(codec, weights, torch.ones(256), torch.arange(256))
    planes = codec.encode(sections.numpy(), sections.nearest(weights).numpy())
    assert torch.equal(rounded_like(codec.name, planes, weights), sections.values(sections.nearest(weights)))


def test_inputs_are_rounded_as_llamacpp_does() -> None:
    inputs = torch.tensor([[127.0, 1.4] + [0.0] * 30 + [1.27, 0.004] + [0.0] * 30])

    def rounded(*codecs: str) -> Tensor:
        tensors = [TensorCheck(name, f"gguf:{name}", (2, 2), 8, None, None, True, None) for name in codecs]
        rule = engine_rounding(tensors)
        return inputs if rule is None else rule(inputs)

    assert rounded("Q8_0", "F32")[0, [1, 32, 33]].tolist() == pytest.approx([1, 1.27, 0], abs=1e-6)
    assert rounded("Q4_K", "Q8_0")[0, [1, 32, 33]].tolist() == pytest.approx([1, 1, 0])
    assert torch.equal(rounded("F16"), inputs.half().float())
    assert torch.equal(rounded("BF16", "F16"), inputs.bfloat16().float())
    assert torch.equal(rounded("F32"), inputs)


def test_a_part_may_be_as_far_off_as_those_before_it() -> None:
    parts = [Part("a", 0.1, 0.1, ()), Part("b", 0.29, 0.01, ()), Part("c", 0.5, 0.01, ())]
    assert [part.name for part in parts_above(parts, 3.0)] == ["c"]


def test_positions_tell_windows_from_weights() -> None:
    assert "alike" in by_position([9, 1, 1.2, 1, 0.9, 1.1, 1, 1])
    assert "grows" in by_position([9, 1, 1.5, 2, 3, 4, 5, 6])
    assert "begins at 50% of the window" in by_position([9, 0, 0, 0, 1, 1.1, 1, 1])


def test_settings_are_compared_by_value() -> None:
    source = {"rope_parameters": {"rope_theta": 1e4}, "rms_norm_eps": 1e-6, "vocab_size": 3, "sliding_window": None}
    assert (
        different_settings({"rope_theta": 1e4, "rms_norm_eps": float(np.float32(1e-6)), "vocab_size": 4}, source) == []
    )
    assert len(different_settings({"rms_norm_eps": 10**400}, source)) == 1
    assert different_settings({"rope_theta": 1.1e4, "sliding_window": 8}, source) == [
        "The file's config has rope_theta 11000.0, and the source's 10000.0."
    ]
