"""End-to-end tuning: its gradient, the numbers that it changes, and those that it must not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.fit_sections import fit_sections
from lqexport.grids.sections import TensorSections
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Silent
from lqexport.storage.artifact import Artifact, SolvedModel, digest
from lqexport.tuning.tune import HELD_OUT, Tuner
from lqexport.tuning.tuned_numbers import tuned_values

TARGETS = ["gguf:Q2_K", "gguf:Q3_K", "gguf:IQ4_NL", "native:table-2", "native:affine-3-g64"]


def recipe_for(model: Path, target: str, text: Path, **options: object) -> Recipe:
    return Recipe(str(model), target, calibration=str(text), samples=4, sequence_length=64, **options)


@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_is_that_of_the_divergence(tiny_model: Path, target: str, text: Path, tmp_path: Path) -> None:
    """Compares the gradient along a random direction through all numbers with a central difference.

    The tolerance is relative to the gradient's norm, which is the slope's standard deviation: the slope itself may be
    near zero.
    """
    quantize(recipe_for(tiny_model, target, text, tune=0), tmp_path / "out")
    artifact, source = Artifact(tmp_path / "out"), open_source(str(tiny_model))
    solved = SolvedModel(artifact, source.config, list(artifact.manifest()))
    tokens = torch.randint(0, 512, (3 + HELD_OUT, 32), generator=torch.Generator().manual_seed(1))
    models = BlockModel(solved, dtype=torch.float64), BlockModel(source, dtype=torch.float64)
    tuner = Tuner(artifact, *models, tokens, rate=0.0, folder=tmp_path / "work", listener=Silent())
    tuner.deltas = {key: delta.detach().double().requires_grad_() for key, delta in tuner.deltas.items()}
    targets, inputs = tuner._targets(), tuner.solved.start(tokens[:1])

    def divergence() -> float:
        return float(tuner._divergence(tuner._forward(inputs)[-1][0], targets[0]).detach())

    hidden = tuner._forward(inputs)
    gradient = tuner._head_backward(hidden[-1], targets[0])
    for index in reversed(range(len(tuner.blocks))):
        gradient = tuner._block_backward(index, hidden[index], gradient)
    draw = torch.Generator().manual_seed(2)
    direction = {key: torch.randn(delta.shape, generator=draw).double() for key, delta in tuner.deltas.items()}
    slope = sum(float((tuner.deltas[key].grad * step).sum()) for key, step in direction.items())
    size = sum(float(tuner.deltas[key].grad.square().sum()) for key in direction) ** 0.5
    measured = []
    for sign in (1, -1):
        for key, step in direction.items():
            tuner.deltas[key].data = sign * 1e-4 * step
        measured.append(divergence())
    assert (measured[0] - measured[1]) / 2e-4 == pytest.approx(slope, rel=0, abs=1e-3 * size)


@pytest.mark.parametrize("name", ["exl2:2g32x8", "exl2:8g32x1+5g64x1+4g32x1+3g96x1+2g32x1", "gptq:4-g64-act"])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_rounded_values_have_the_derivatives_of_unrounded_ones(name: str, size: float) -> None:
    """Values are the file's, bit for bit, even of numbers that are not rounded yet.

    Derivatives are those of the unrounded product.
    """
    draw = torch.Generator().manual_seed(1)
    weights, order = torch.randn(32, 256, generator=draw) * size, torch.randperm(256, generator=draw)
    fitted = fit_sections(codec_named(name), weights, torch.ones(256), order)
    codes, stored = fitted.nearest(weights), fitted.numpy()
    grid = TensorSections.of(stored, torch.device("cpu"))
    assert codec_named(name).encode(grid.numpy(), codes.numpy()).keys() == codec_named(name).layout(32, 256).keys()
    numbers = grid.numbers().requires_grad_()
    values = tuned_values(grid, codes, {"sections": numbers})
    assert np.array_equal(values.detach().numpy(), stored.values(codes.numpy()))
    moved = grid.with_numbers(numbers.detach() * 1.003)
    assert torch.equal(moved.straight_through(codes), moved.stored().values(codes))
    gains = torch.randn(32, 256, generator=draw)
    (values * gains).sum().backward()
    # The product is linear in the numbers, so the sum of number times derivative is the sum of the product.
    runs = zip(grid.slices(), grid.sections, strict=True)
    smooth = torch.cat([part.smooth().values(codes[:, grid.order[where]]) for where, part in runs], dim=1)
    total = float((smooth * gains[:, grid.order]).detach().sum())
    assert float((numbers.grad * numbers.detach()).sum()) == pytest.approx(total, rel=1e-3)


def tuner_of(folder: Path, source: Path, cache_bytes: tuple[int, int] = (0, 0)) -> Tuner:
    """Returns a tuner that changes a finished artifact, for eight steps on random tokens."""
    artifact, model = Artifact(folder), open_source(str(source))
    solved = SolvedModel(artifact, model.config, list(artifact.manifest()))
    tokens = torch.randint(0, 512, (8 + HELD_OUT, 32), generator=torch.Generator().manual_seed(1))
    return Tuner(
        artifact,
        BlockModel(solved),
        BlockModel(model),
        tokens,
        rate=0.03,
        folder=folder / "work",
        listener=Silent(),
        cache_bytes=cache_bytes,
    )


@pytest.mark.parametrize("cache_bytes", [(1 << 62, 0), (0, 1 << 62), (100_000, 100_000)])
@pytest.mark.parametrize("target", ["gguf:Q4_K", "exl2"])
def test_what_is_kept_unpacked_changes_nothing(
    tiny_model: Path, target: str, cache_bytes: tuple[int, int], tmp_path: Path
) -> None:
    recipe = Recipe(str(tiny_model), target, bits=2.3 if target == "exl2" else None, method="rtn")
    quantize(recipe, tmp_path / "anew")
    shutil.copytree(tmp_path / "anew", tmp_path / "kept")
    anew, kept = (
        tuner_of(tmp_path / name, tiny_model, cache_bytes)
        for name, cache_bytes in (("anew", (0, 0)), ("kept", cache_bytes))
    )
    assert anew.run() == kept.run()
    assert not anew.tensors._on_device
    assert kept.tensors._on_device or kept.tensors._on_host
    for name in anew.artifact.manifest():
        assert digest(anew.artifact.read(name).planes) == digest(kept.artifact.read(name).planes)


@pytest.mark.parametrize(
    ("target", "bits", "moved"), [("exl2", 2.3, "q_scale_max"), ("gptq:4-g64-sym", None, "scales")]
)
def test_tuning_moves_maxima_and_scales_alone(
    tiny_model: Path, target: str, bits: float | None, moved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning that was stopped and resumed ends in the same bits."""
    quantize(Recipe(str(tiny_model), target, bits=bits, method="rtn"), tmp_path / "before")
    before, after, stopped = (Artifact(tmp_path / name) for name in ("before", "after", "stopped"))
    for artifact in (after, stopped):
        shutil.copytree(before.folder, artifact.folder)
    outcome = tuner_of(after.folder, tiny_model).run()
    assert outcome.kept
    stop_tuning_half_way(tuner_of(stopped.folder, tiny_model), monkeypatch)
    assert tuner_of(stopped.folder, tiny_model).run() == outcome
    for name in before.manifest():
        old, new, again = (artifact.read(name).planes for artifact in (before, after, stopped))
        assert digest(new) == digest(again)
        if "proj" in name:
            assert {plane for plane in old if not np.array_equal(old[plane], new[plane])} == {moved}


def test_numbers_without_a_gradient_have_no_state_to_save(tiny_model: Path, tmp_path: Path) -> None:
    """Such as those of an expert without tokens, or of what only chooses. Others may have had fewer steps."""
    quantize(Recipe(str(tiny_model), "gguf:Q4_0", method="rtn"), tmp_path / "out")
    tuner, again = (tuner_of(tmp_path / "out", tiny_model) for _ in range(2))
    key, other, *_ = tuner.deltas
    optimizer, resumed = (torch.optim.Adam(list(each.deltas.values())) for each in (tuner, again))
    for names in ([other], [name for name in tuner.deltas if name != key]):
        for name in names:
            tuner.deltas[name].grad = torch.ones_like(tuner.deltas[name])
        optimizer.step()
        optimizer.zero_grad()
    tuner.folder.mkdir(exist_ok=True)
    tuner._save(2, 1.0, optimizer)
    assert again._resume(resumed) == (2, 1.0)
    assert resumed.state[again.deltas[key]] == {}
    for name in tuner.deltas:
        theirs, ours = optimizer.state[tuner.deltas[name]], resumed.state[again.deltas[name]]
        assert torch.equal(again.deltas[name], tuner.deltas[name])
        assert {part: values.tolist() for part, values in theirs.items()} == {
            part: values.tolist() for part, values in ours.items()
        }
    assert float(resumed.state[again.deltas[other]]["step"]) == 2


def stop_tuning_half_way(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Tuner._save

    def stop(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        tuner.run()
    monkeypatch.setattr(Tuner, "_save", save)


@pytest.mark.parametrize("target", TARGETS)
def test_tuning_moves_only_what_is_stored_as_floats(tiny_model: Path, target: str, text: Path, tmp_path: Path) -> None:
    quantize(recipe_for(tiny_model, target, text, tune=0), tmp_path / "before")
    report = quantize(recipe_for(tiny_model, target, text, tune=48, tune_rate=0.03), tmp_path / "after")
    tuning = report["tuning"]
    assert tuning["kept"]
    assert tuning["held_out_kl_after"] < 0.97 * tuning["held_out_kl_before"]
    before, after = Artifact(tmp_path / "before"), Artifact(tmp_path / "after")
    for name in before.manifest():
        old, new = before.read(name), after.read(name)
        codec = codec_named(old.codec_name)
        assert new.codec_name == old.codec_name
        assert {k: (v.dtype, v.shape) for k, v in new.planes.items()} == {
            k: (v.dtype, v.shape) for k, v in old.planes.items()
        }
        if isinstance(codec, GridCodec) and "proj" in name:
            (grid, codes), (tuned, new_codes) = (codec.unpack(t.planes, t.shape[1]) for t in (old, new))
            if grid.scale is None:  # a table may be sorted anew
                assert np.all(np.diff(tuned.levels, axis=1) >= 0)
                continue
            assert np.array_equal(codes, new_codes)
            assert np.array_equal(grid.scale.subs, tuned.scale.subs)
            assert not np.array_equal(grid.scale.supers, tuned.scale.supers)
    assert not (tmp_path / "after" / "work").exists()


def test_tuning_that_does_not_help_is_dropped(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    quantize(recipe_for(tiny_model, "gguf:Q2_K", text, tune=0), tmp_path / "plain")
    report = quantize(recipe_for(tiny_model, "gguf:Q2_K", text, tune=8, tune_rate=300.0), tmp_path / "wild")
    assert not report["tuning"]["kept"]
    assert Artifact(tmp_path / "plain").manifest() == Artifact(tmp_path / "wild").manifest()
