"""Which codec holds the grid of which checkpoint, and which weights are solved again because no codec holds theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_layouts import DOWN, Q_PROJ, Made, Make, coded, gptq_tensors, same_bits
from checkpoint_layouts import make as make
from checkpoint_layouts import make_gptq as make_gptq
from numpy.typing import NDArray
from safetensors.torch import load_file

from lqexport.formats.codec import PlainCodec, nbytes
from lqexport.formats.gguf import E2M1
from lqexport.formats.moves import AffineGrid, FloatGrid, TableGrid, move
from lqexport.formats.registry import codec_named, names
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

CHECKPOINTS = {
    "4 bits, symmetric, groups of 128": (4, 128, True),
    "4 bits, groups of 128": (4, 128, False),
    "4 bits, a scale per row": (4, 0, False),
    "3 bits, groups of 128": (3, 128, False),
    "2 bits, groups of 64": (2, 64, False),
    "8 bits, symmetric, groups of 128": (8, 128, True),
    "8 bits, groups of 128": (8, 128, False),
}
CODEC_NAMES = [name for name in (*names("gguf"), *names("native")) if not isinstance(codec_named(name), PlainCodec)]


def affine(bits: int, group: int, symmetric: bool, scale: float = 0.01) -> AffineGrid:
    """Returns a grid of 4 rows and 512 columns; `group` 0 is one group per row.

    The zero points of an asymmetric grid count up from 1.
    """
    draw, groups = np.random.default_rng(bits), 512 // (group or 512)
    scales = (scale * draw.uniform(0.5, 1, (4, groups))).astype(np.float16).astype(np.float32)
    zero = 1 + np.arange(4 * groups).reshape(4, groups) % (2**bits - 1)
    zero[:] = 2 ** (bits - 1) if symmetric else zero
    return AffineGrid(bits, scales, zero.astype(np.int16), np.arange(512) // (group or 512))


def mxfp4() -> FloatGrid:
    """Returns a grid of 4 rows and 512 columns in MXFP4."""
    scale = np.exp2(np.random.default_rng(4).integers(-12, -5, (4, 16))).astype(np.float32)
    return FloatGrid(E2M1, scale, np.arange(512) // 32)


def holds(source: AffineGrid | FloatGrid, name: str) -> bool:
    """Returns whether a codec holds all values of the grid. If it says so, its decoded bytes are compared."""
    codec, count = codec_named(name), 2**source.bits if isinstance(source, AffineGrid) else len(source.levels)
    codes = np.random.default_rng(0).integers(0, count, (4, 512)).astype(np.uint8)
    codes[0, :2] = 0, count - 1
    try:
        moved = move(source, codec)
    except ValueError:
        return False
    assert same_bits(codec.decode(codec.encode(moved.grid, moved.codes(codes)), 512), source.values(codes))
    return True


@pytest.mark.parametrize("checkpoint", [*CHECKPOINTS, "MXFP4"])
def test_the_table_of_docs_says_what_moves_where(checkpoint: str, root: Path) -> None:
    grid = mxfp4() if checkpoint == "MXFP4" else affine(*CHECKPOINTS[checkpoint])
    held = [name for name in CODEC_NAMES if holds(grid, name)]
    shown = [name.removeprefix("gguf:") for name in held if name.startswith("gguf:")]
    native_ones = [name for name in held if name.startswith("native:")]
    smallest = min(native_ones, key=lambda name: nbytes(codec_named(name), 4, 512), default="-").removeprefix("native:")
    line = f"| {checkpoint} | {', '.join(shown) or '-'} | {smallest} |"
    assert line in (root / "docs" / "checkpoints.md").read_text()


@pytest.mark.parametrize("name", [*CODEC_NAMES, "gptq:4-g32", "exl2:4g128x4"])
def test_no_codec_takes_what_it_does_not_hold(name: str) -> None:
    """Refuses scales that are no float16, groups that cross the codec's, columns in another order, and tables."""
    table = TableGrid(np.zeros((4, 16), np.float32), 512)
    ordered = affine(4, 128, True)
    shuffled = np.random.default_rng(0).permutation(ordered.group_of)
    wrong = [
        AffineGrid(4, ordered.scale * np.float32(1e-7), ordered.zero, ordered.group_of),
        AffineGrid(4, ordered.scale * np.float32(1 + 2**-12), ordered.zero, ordered.group_of),
        AffineGrid(4, ordered.scale, ordered.zero, shuffled),
        AffineGrid(4, ordered.scale, ordered.zero, np.minimum(np.arange(512) // 124, 3)),
        *([] if name == "native:table-4" else [table]),
        FloatGrid(E2M1, ordered.scale * np.float32(1 + 2**-12), ordered.group_of),
        FloatGrid(E2M1, np.full((4, 1), 2.0**126, np.float32), np.zeros(512, np.int64))
        if name != "gguf:MXFP4"
        else FloatGrid(np.arange(16, dtype=np.float32), ordered.scale, ordered.group_of),
    ]
    for grid in wrong:
        with pytest.raises(ValueError, match=r"its |has no "):
            move(grid, codec_named(name))


def test_groups_in_act_order_are_solved_again(make_gptq: Make, text: Path, tmp_path: Path) -> None:
    checkpoint = make_gptq(act_order=True)
    quick = {"samples": 2, "sequence_length": 64, "moments": "normalized", "descent": 1, "calibration": str(text)}
    quantize(Recipe(str(checkpoint.folder), "gguf:Q5_0", tune=0, **quick), tmp_path / "out")
    entry = {entry["name"]: entry for entry in Artifact(tmp_path / "out").report()["tensors"]}[f"{DOWN}.weight"]
    assert "act-order" in entry["source_grid"]
    assert 0 < entry["relative_error"] < 0.01
    # GPTQ's own layout holds these groups: it stores the group of each column.
    quantize(Recipe(str(checkpoint.folder), "gptq:4-g128-act"), tmp_path / "gptq")
    stored = load_file(checkpoint.folder / "model.safetensors")
    for plane, array in Artifact(tmp_path / "gptq").read(f"{DOWN}.weight").planes.items():
        assert np.array_equal(array, stored[f"{DOWN}.{plane}"].numpy())


def test_tuning_leaves_what_was_moved(make: Make, text: Path, tmp_path: Path) -> None:
    """One linear is in act-order and is solved again. The grids of the others fit, so tuning leaves them."""

    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        linear = coded(weight, 4, 128, True, act_order=name == DOWN)
        return gptq_tensors(name, linear), linear.values

    checkpoint = make(tensors_of, {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True})
    recipe = Recipe(str(checkpoint.folder), "gguf:Q4_0", samples=2, sequence_length=32, moments="normalized",
                    descent=1, tune=2, calibration=str(text))  # fmt: skip
    quantize(recipe, tmp_path / "out")
    export = open_export(tmp_path / "out")
    kept = [name for name in checkpoint.values if same_bits(export.read(name).numpy(), checkpoint.values[name])]
    assert {name for name in checkpoint.values if "proj" in name} - set(kept) == {f"{DOWN}.weight"}
    facts = {name: Artifact(tmp_path / "out").facts(name) for name in checkpoint.values}
    assert "tuned" not in facts[f"{Q_PROJ}.weight"]
    assert Artifact(tmp_path / "out").report()["tuning"]["kept"] == ("tuned" in facts[f"{DOWN}.weight"])


def test_what_is_kept_with_and_without_smoothing_is_not_mixed_up(make_gptq: Make, text: Path, tmp_path: Path) -> None:
    """A weight that is moved keeps the whole model from being smoothed, so second moments are others."""
    smoothed = Recipe(str(make_gptq(symmetric=True).folder), "gguf:Q2_K", samples=2, sequence_length=32,
                      moments="normalized", prefix="full", descent=1, tune=0, smooth=True,
                      calibration=str(text))  # fmt: skip
    moving = replace(smoothed, types=[f"{DOWN}.weight=Q4_0"])
    quantize(moving, tmp_path / "alone")
    quantize(smoothed, tmp_path / "first", cache=tmp_path / "cache")
    quantize(moving, tmp_path / "second", cache=tmp_path / "cache")
    assert Artifact(tmp_path / "second").manifest() == Artifact(tmp_path / "alone").manifest()
