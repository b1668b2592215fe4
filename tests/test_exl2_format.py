"""EXL2: layers that ExLlamaV2's kernel decoded, the laws of a codec for all mixes of widths, and refused inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lqexport.formats import exl2
from lqexport.formats.codec import Grid, Rounding, Run, Sections, bits_per_weight
from lqexport.formats.exl2 import BITS, Exl2, SquaredScales, joined, levels, name_of, of_planes
from lqexport.formats.registry import codec_named

VECTORS = sorted((Path(__file__).parent / "golden" / "exl2").glob("*.safetensors"))

pytestmark = pytest.mark.filterwarnings("error")
seeds = st.integers(0, 2**32 - 1)
examples = settings(max_examples=30, deadline=None, derandomize=True)
mixes = st.lists(
    st.builds(Run, st.sampled_from(BITS), st.sampled_from([32, 64, 96, 128]), st.integers(1, 3)), min_size=1, max_size=6
).map(lambda runs: joined(sorted(runs, key=lambda run: -run.bits)))


def vector(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the planes of a layer, and its weights [rows, columns] as ExLlamaV2's kernel decoded them."""
    content = load_file(path)
    expected = content.pop("expected").T
    return {name.removeprefix("layer."): plane for name, plane in content.items() if "bias" not in name}, expected


def random_case(runs: tuple[Run, ...], seed: int) -> tuple[Exl2, Sections, np.ndarray]:
    draw = np.random.default_rng(seed)
    codec = Exl2(runs)
    rows, codes = 32 * int(draw.integers(1, 4)), []
    order, grids = draw.permutation(codec.columns), []
    for run in runs:
        maxima = draw.choice([1e-7, 0.003, 0.02, 1.0, 300.0], run.count) * draw.uniform(0.5, 1, run.count)
        scale = SquaredScales(maxima.astype(np.float16), draw.integers(0, 16, (rows, run.count), dtype=np.int16))
        grids.append(Grid(run.columns, levels(run.bits), scale, rounding=Rounding.HALF))
        codes.append(draw.integers(0, 2**run.bits, (rows, run.columns), dtype=np.uint8))
    natural = np.empty((rows, codec.columns), np.uint8)
    natural[:, order] = np.concatenate(codes, axis=1)
    return codec, Sections(order, tuple(grids)), natural


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# Compared with ExLlamaV2.


def test_the_vectors_are_there() -> None:
    assert len(VECTORS) == 12


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_decoding_equals_exllamav2s_kernel_bitwise(path: Path) -> None:
    planes, expected = vector(path)
    decoded = of_planes(planes).decode(planes, expected.shape[1])
    assert same_bits(decoded.astype(np.float16), np.ascontiguousarray(expected))


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_every_bit_of_a_vector_is_kept(path: Path) -> None:
    planes, expected = vector(path)
    codec = of_planes(planes)
    again = codec.encode(*codec.unpack(planes, expected.shape[1]))
    assert planes.keys() == again.keys()
    assert all(same_bits(again[name], plane) for name, plane in planes.items())


# The laws.


@examples
@given(runs=mixes, seed=seeds)
def test_decoding_what_was_encoded_gives_the_grids_values_bitwise(runs: tuple[Run, ...], seed: int) -> None:
    codec, grid, codes = random_case(runs, seed)
    planes = codec.encode(grid, codes)
    assert same_bits(codec.decode(planes, codec.columns), grid.values(codes))
    assert {name: (plane.dtype, plane.shape) for name, plane in planes.items()} == codec.layout(*codes.shape)


@examples
@given(runs=mixes, seed=seeds)
def test_unpacking_gives_back_grid_and_codes(runs: tuple[Run, ...], seed: int) -> None:
    codec, grid, codes = random_case(runs, seed)
    planes = codec.encode(grid, codes)
    assert of_planes(planes).name == codec.name
    unpacked, unpacked_codes = codec.unpack(planes, codec.columns)
    assert same_bits(unpacked_codes, codes)
    assert same_bits(unpacked.order, grid.order)
    for restored, original in zip(unpacked.grids, grid.grids, strict=True):
        assert same_bits(restored.scale.maxima, original.scale.maxima)
        assert same_bits(restored.scale.subs, original.scale.subs)


@examples
@given(runs=mixes)
def test_names_give_the_runs_back(runs: tuple[Run, ...]) -> None:
    assert codec_named(name_of(runs)).runs == runs


@examples
@given(seed=seeds)
def test_values_are_computed_in_float16_as_the_kernel_does(seed: int) -> None:
    """Decodes with NumPy's float16, which rounds the result of each operation once."""
    _, grid, codes = random_case((Run(8, 64, 2), Run(3, 32, 1)), seed)
    values = grid.values(codes)
    for columns, part in grid.runs():
        width = part.columns // part.scale.subs.shape[1]
        for k, column in enumerate(columns):
            small = part.scale.maxima[k // width] / np.float16(256)
            step = (part.scale.subs[:, k // width].astype(np.float16) + np.float16(1)) ** 2
            level = (codes[:, column].astype(np.int64) - len(part.levels) // 2).astype(np.float16)
            assert same_bits((level * (step * small)).astype(np.float32), values[:, column])


@examples
@given(seed=seeds)
def test_nearest_is_nearest(seed: int) -> None:
    _, grid, codes = random_case((Run(6, 32, 1), Run(2, 96, 1)), seed)
    draw = np.random.default_rng(seed)
    weights = (grid.values(codes) * draw.uniform(0.5, 1.5, codes.shape)).astype(np.float32)
    distance = np.abs(grid.values(grid.nearest(weights)) - weights)
    for columns, part in grid.runs():
        choices = [part.values(np.full((len(codes), part.columns), code, np.uint8)) for code in range(len(part.levels))]
        best = np.abs(np.array(choices) - weights[:, columns]).min(axis=0)
        # Values are rounded to float16, so of two at nearly the same distance the farther may be taken.
        assert np.all(distance[:, columns] <= best + np.abs(choices).max() * 2.0**-11 + 2.0**-25)


def test_what_a_file_spends_on_a_weight() -> None:
    """Counts the format's bits: the codes, 16 + 32 per group, 4 per group and row, 32 per column."""
    rows, columns = 4096, 4096
    for bits in BITS:
        expected = bits + (32 * (16 + 32) + 4 * 32 * rows + 32 * columns) / (rows * columns)
        assert bits_per_weight(codec_named(f"exl2:{bits}g128x32"), rows, columns) == pytest.approx(expected)


# Refused: what ExLlamaV2 would load and compute wrongly.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exl2:3g32x1+4g32x1", "they rise"),
        ("exl2:4g32x1+3g32x1+4g32x1", "they rise"),
        ("exl2:2g16x4", "multiple of it"),
        ("exl2:4g48x2", "multiple of it"),
        ("exl2:4g32x0", "multiple of it"),
        ("exl2:7g32x1", "no codes of 7 bits"),
        ("exl2:4g32x1+4g32x1", "one run"),
        ("exl2:2g32x2048", "at most 65535 columns"),
        ("exl2:4g128x512", "at most 65535 columns"),
        ("exl2:Q4", "not a format of EXL2"),
        ("exl2:4g128x", "not a format of EXL2"),
    ],
)
def test_formats_that_exllamav2_decodes_wrongly_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec_named(name)


def test_more_lines_than_int16_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exl2, "MOST_LINES", 31)
    codec_named("exl2:8g32x3+6g32x1")
    with pytest.raises(ValueError, match="at most 31 lines"):
        codec_named("exl2:8g32x4")


@pytest.mark.parametrize(
    ("rows", "columns", "message"), [(48, 64, "32 rows"), (0, 64, "32 rows"), (32, 96, "64 columns")]
)
def test_shapes_that_do_not_fit_are_refused(rows: int, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec_named("exl2:4g32x2").layout(rows, columns)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([3, 0, 4, 6], "they rise"),
        ([4, 0, 3, 5], "ends within a column"),
        ([4, 1, 3, 8], "begin at line 0"),
        ([4, 0, 3, 0], "one after the other"),
        ([4, 0, 3, 99], "one after the other"),
        ([7, 0, 3, 7], "groups of 7 bits"),
        ([4, 0, 2, 6], "multiple of it"),
        ([], "begin at line 0"),
    ],
)
def test_group_tables_that_are_wrong_are_refused(groups: list[int], message: str) -> None:
    planes = {"q_groups": np.array(groups, np.int16), "q_weight": np.zeros((10, 32), np.int32)}
    with pytest.raises(ValueError, match=message):
        of_planes(planes)


@pytest.mark.parametrize(
    ("name", "plane", "message"),
    [
        ("q_scale_max", np.zeros(2, np.float32), "must be float16"),
        ("q_scale", np.zeros((2, 5), np.int32), r"\[2, 4\], not int32 \[2, 5\]"),
        ("q_groups", np.array([4, 0, 4, 5], np.int16), "does not list"),
        ("q_groups", np.array([4, 0, 4, 4], np.int32), "must be int16"),
        ("q_invperm", np.zeros(64, np.int32), "each of 0..63 once"),
        ("q_perm", np.zeros(64, np.int32), "not q_weight"),
    ],
)
def test_planes_that_are_wrong_are_refused(name: str, plane: np.ndarray, message: str) -> None:
    codec, grid, codes = random_case((Run(4, 32, 2),), 1)
    planes = codec.encode(Sections(grid.order, tuple(with_rows(part, 32) for part in grid.grids)), codes[:32])
    with pytest.raises(ValueError, match=message):
        codec.decode(planes | {name: plane}, 64)


def with_rows(part: Grid, rows: int) -> Grid:
    return dataclasses.replace(part, scale=SquaredScales(part.scale.maxima, part.scale.subs[:rows]))


@pytest.mark.parametrize("maximum", [np.nan, np.inf, -0.01, 8192.0])
def test_maxima_that_give_no_finite_weights_are_refused(maximum: float) -> None:
    codec, grid, codes = random_case((Run(4, 32, 1),), 1)
    subs = grid.grids[0].scale.subs
    scale = SquaredScales(np.array([maximum], np.float16), subs)
    with pytest.raises(ValueError, match="maximum"):
        codec.encode(Sections(grid.order, (dataclasses.replace(grid.grids[0], scale=scale),)), codes)


def test_grids_of_another_format_are_refused() -> None:
    codec, grid, codes = random_case((Run(4, 32, 2), Run(3, 32, 1)), 1)
    first, second = grid.grids
    scale = first.scale
    wrong: list[tuple[str, Sections]] = [
        ("1 runs", Sections(grid.order, (first,))),
        (
            "run of 4 bits",
            dataclasses.replace(grid, grids=(dataclasses.replace(first, rounding=Rounding.NONE), second)),
        ),
        ("run of 4 bits", dataclasses.replace(grid, grids=(dataclasses.replace(first, levels=levels(3)), second))),
        ("0..15", replaced(grid, SquaredScales(scale.maxima, scale.subs + np.int16(16)))),
        ("must be int16", replaced(grid, SquaredScales(scale.maxima, scale.subs[:, :1]))),
        ("must be float16", replaced(grid, SquaredScales(scale.maxima.astype(np.float32), scale.subs))),
        ("once", dataclasses.replace(grid, order=np.zeros_like(grid.order))),
    ]
    for message, other in wrong:
        with pytest.raises(ValueError, match=message):
            codec.encode(other, codes)
    codes[:, grid.order[-1]] = 8
    with pytest.raises(ValueError, match="too large for 3 bits"):
        codec.encode(grid, codes)


def replaced(grid: Sections, scale: SquaredScales) -> Sections:
    return dataclasses.replace(grid, grids=(dataclasses.replace(grid.grids[0], scale=scale), *grid.grids[1:]))
