"""Laws of every codec in the registry. Each GGUF type is compared with gguf (gguf-py) and libgguf (ggml in C)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_files import random_codes

from lqexport.formats.codebook import Codebook
from lqexport.formats.codec import (
    FLOAT16,
    WHOLE,
    FloatFormat,
    Grid,
    GridCodec,
    PlainCodec,
    ScaleFormat,
    Scales,
    bits_per_weight,
)
from lqexport.formats.native import pack_bits
from lqexport.formats.registry import codec_named, names

PLAIN = ["gguf:F32", "gguf-norm:F32", "gguf-decay:F32", "gguf-whole:I32", "gguf:F16", "gguf:BF16"]
GRIDS = [name for name in names() if name not in [*PLAIN, *names("mlx")]]  # tests/test_mlx_format.py has those
BLOCK_TYPES = [name for name in names("gguf") if name not in PLAIN]
WITH_UNUSED_BITS = ["gguf:TQ1_0", "gguf:TQ2_0", "gguf:NVFP4"]
"""Block types of which other bytes decode to the same values, or to values that no quantizer writes."""
GOLDEN = json.loads((Path(__file__).parent / "golden" / "formats.json").read_text())

pytestmark = pytest.mark.filterwarnings("error")
every_codec = pytest.mark.parametrize("name", [name for name in names() if name not in names("mlx")])
every_grid = pytest.mark.parametrize("name", GRIDS)
SCALAR = [name for name in GRIDS if codec_named(name).codebook is None]
VECTORS = [name for name in GRIDS if name not in SCALAR]
every_block_type = pytest.mark.parametrize("name", BLOCK_TYPES)
seeds = st.integers(0, 2**32 - 1)
examples = settings(max_examples=20, deadline=None, derandomize=True)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays have the same dtype, shape and bits, so that -0.0 differs from 0.0."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def float16s(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns random finite float16: any bit pattern, the size of real weights, zeros, subnormals and extremes."""
    values = rng.integers(0, 2**16, shape, dtype=np.uint16).view(np.float16)
    values = np.where(
        rng.random(shape) < rng.choice([0, 0.5, 1]), rng.normal(0, 0.02, shape).astype(np.float16), values
    )
    special = np.array([0.0, -0.0, 2.0**-24, -(2.0**-24), 65504, -65504], dtype=np.float16)
    values = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), values)
    return np.where(np.isfinite(values), values, np.float16(-0.0))


def small_floats(rng: np.random.Generator, floats: FloatFormat, shape: tuple[int, ...]) -> np.ndarray:
    """Returns random float32 numbers that a format of few bits can store, the least and the largest among them."""
    highest = min(int(np.log2(floats.most)), 100)  # values beyond would be infinite
    exponents = rng.integers(floats.lowest, highest, shape, endpoint=True)
    multiples = rng.integers(2**floats.mantissa, 2 ** (floats.mantissa + 1), shape)
    numbers = np.ldexp(multiples.astype(np.float64), exponents - floats.mantissa).clip(max=floats.most)
    special = [floats.least, 2.0 ** (floats.lowest - floats.mantissa), min(floats.most, 2.0**100)]
    return np.where(rng.random(shape) < 0.1, rng.choice(special, shape), numbers).astype(np.float32)


def random_scales(rng: np.random.Generator, scale_format: ScaleFormat | None, rows: int, columns: int) -> Scales | None:
    if scale_format is None:
        return None
    groups = scale_format.groups(columns)
    steps = (scale_format.high - scale_format.low) // scale_format.step
    subs = scale_format.low + scale_format.step * rng.integers(0, steps, (rows, groups), dtype=np.int16, endpoint=True)
    if scale_format.floats != FLOAT16:
        return Scales(scale_format, small_floats(rng, scale_format.floats, (rows, groups)), subs)
    return Scales(scale_format, float16s(rng, (rows, groups // scale_format.span)), subs)


def random_case(name: str, seed: int) -> tuple[GridCodec, Grid, np.ndarray]:
    """Returns a codec, a random grid of it, and codes uint8 [rows, columns]."""
    rng, grid_codec = np.random.default_rng(seed), codec_named(name)
    rows = int(rng.integers(1, 6))
    columns = grid_codec.block * int(rng.integers(1, 4 if grid_codec.block > 1 else 80))
    levels = grid_codec.levels
    if levels is None:
        levels = np.sort(float16s(rng, (rows, grid_codec.level_count)).astype(np.float32), axis=1)
    scale = random_scales(rng, grid_codec.scale, rows, columns)
    offset = random_scales(rng, grid_codec.offset, rows, columns)
    codes = random_codes(rng, grid_codec, rows, columns)
    # Any float32 is one, also a number by which products are rounded.
    whole = float(np.float32(rng.normal(0, 1e-3))) if grid_codec.has_whole else 1.0
    return grid_codec, Grid(columns, levels, scale, offset, codebook=grid_codec.codebook, whole=whole), codes


def random_blocks(name: str, seed: int) -> np.ndarray:
    """Returns random packed rows, uint8 [7, bytes of 3 blocks], whose float16 numbers are finite."""
    rng, block_type = np.random.default_rng(seed), codec_named(name)
    blocks = rng.integers(0, 256, block_type.layout(7, 3 * block_type.block)["blocks"][1], dtype=np.uint8)
    structs = blocks.view(block_type.members)
    for member in block_type.supers:
        if name == "gguf:IQ1_M":
            structs[member] &= 0x0FFF  # the highest bits are a float16: a small one of either sign
            structs[member][..., 3] |= rng.choice([0x2000, 0xA000], structs.shape).astype(np.uint16)
        elif structs[member].dtype == np.float16:
            structs[member] = float16s(rng, structs.shape)
        elif structs[member].shape == structs.shape:  # an exponent; with the largest, values would be infinite
            structs[member] = rng.integers(0, 253, structs.shape)
    return blocks


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.split(":")[1]]


# The laws of a grid codec.


@every_grid
@examples
@given(seed=seeds)
def test_decoding_what_was_encoded_gives_the_grids_values_bitwise(name: str, seed: int) -> None:
    grid_codec, grid, codes = random_case(name, seed)
    decoded = grid_codec.decode(grid_codec.encode(grid, codes), codes.shape[1])
    assert same_bits(decoded, grid.values(codes))


@every_grid
@examples
@given(seed=seeds)
def test_unpacking_gives_back_grid_and_codes(name: str, seed: int) -> None:
    grid_codec, grid, codes = random_case(name, seed)
    unpacked, unpacked_codes = grid_codec.unpack(grid_codec.encode(grid, codes), codes.shape[1])
    assert same_bits(unpacked_codes, codes)
    assert (unpacked.columns, unpacked.whole) == (grid.columns, grid.whole)
    assert same_bits(unpacked.levels, grid.levels)
    for original, restored in ((grid.scale, unpacked.scale), (grid.offset, unpacked.offset)):
        assert (original is None) == (restored is None)
        if original is not None:
            assert original.format == restored.format
            assert same_bits(restored.supers, original.supers)
            assert same_bits(restored.subs, original.subs)


@every_grid
@examples
@given(seed=seeds)
def test_planes_are_as_laid_out_and_rows_move_freely(name: str, seed: int) -> None:
    grid_codec, grid, codes = random_case(name, seed)
    planes = grid_codec.encode(grid, codes)
    assert {key: (plane.dtype, plane.shape) for key, plane in planes.items()} == grid_codec.layout(*codes.shape)
    order = np.random.default_rng(seed).permutation(len(codes))
    rows = {key: plane if key == WHOLE else plane[order] for key, plane in planes.items()}
    moved = grid_codec.decode(rows, codes.shape[1])
    assert same_bits(moved, grid.values(codes)[order])


@every_grid
def test_codes_in_fortran_order_make_the_same_planes_and_values(name: str) -> None:
    grid_codec, grid, codes = random_case(name, 5)
    planes, columns_first = grid_codec.encode(grid, codes), np.asfortranarray(codes)
    for key, plane in grid_codec.encode(grid, columns_first).items():
        assert same_bits(plane, planes[key])
    assert same_bits(grid.values(columns_first), grid.values(codes))


@pytest.mark.parametrize("name", SCALAR)
@examples
@given(seed=seeds)
def test_nearest_is_nearest(name: str, seed: int) -> None:
    _, grid, codes = random_case(name, seed)
    rng = np.random.default_rng(seed)
    at = grid.values(codes)
    weights = (at * rng.uniform(0.5, 1.5, codes.shape) + rng.normal(0, 0.1, codes.shape)).astype(np.float32)
    choices = [grid.values(np.full(codes.shape, code, dtype=np.uint8)) for code in range(grid.levels.shape[-1])]
    best = np.abs(np.array(choices, dtype=np.float64) - weights).min(axis=0)
    distance = np.abs(grid.values(grid.nearest(weights)).astype(np.float64) - weights)
    # Near a tie, float32 cannot tell which value is nearer: it errs by a few roundings of the numbers involved.
    size = np.abs(weights) + np.abs(np.array(choices)).max(axis=0)
    assert np.all(distance <= best + 4 * np.finfo(np.float32).eps * size)


@every_grid
@examples
@given(seed=seeds)
def test_nearest_finds_values_of_the_grid_itself(name: str, seed: int) -> None:
    _, grid, codes = random_case(name, seed)
    if grid.offset is not None:  # a large offset swallows the steps of a small scale
        grid = dataclasses.replace(grid, offset=None)
    values = grid.values(codes)
    assert np.array_equal(grid.values(grid.nearest(values)), values)


@pytest.mark.parametrize("name", VECTORS)
def test_nearest_vectors_are_nearest(name: str) -> None:
    """No vector of the codebook, with any flags that are allowed, is nearer; checked for a few runs of columns."""
    _, grid, codes = random_case(name, 2)
    scale = dataclasses.replace(grid.scale, supers=np.ones_like(grid.scale.supers), subs=np.ones_like(grid.scale.subs))
    grid, rng = dataclasses.replace(grid, scale=scale), np.random.default_rng(3)
    weights = (grid.levels[codes] + rng.normal(0, 0.5, codes.shape)).astype(np.float32)
    book, near = grid.codebook, (grid.levels[grid.nearest(weights)] - weights) ** 2
    book.find(grid.nearest(weights))  # they may stand together
    for start in (0, 32, 64):
        assert near[0, start : start + book.run].sum() == pytest.approx(
            _least(book, weights[0, start : start + book.run], grid.levels), rel=1e-5
        )


def _least(book: Codebook, target: np.ndarray, levels: np.ndarray) -> float:
    """Returns the least squared distance of a run of columns from what the codebook allows, by trying all."""
    parts = target.reshape(-1, book.width).astype(np.float64)
    if book.lift:
        return min(sum(np.square(levels[book.vectors + up] - part).sum(1).min() for part in parts) for up in (0, 1))
    least = []  # for each part of the eight weights, the least distance with an even and with an odd number of minuses
    for part in parts:
        signs = np.array(list(itertools.product((1, -1), repeat=book.width)))
        distances = np.array([np.square(sign * levels[book.vectors] - part).sum(1).min() for sign in signs])
        odd = (signs < 0).sum(1) % 2 == 1
        least.append((distances[~odd].min(), distances[odd].min()))
    parities = itertools.product((0, 1), repeat=len(parts))
    allowed = [parity for parity in parities if not book.even or sum(parity) % 2 == 0]
    return min(sum(pair[odd] for pair, odd in zip(least, parity, strict=True)) for parity in allowed)


@pytest.mark.parametrize("name", VECTORS)
def test_codes_outside_the_codebook_are_refused(name: str) -> None:
    grid_codec, grid, codes = random_case(name, 4)
    absent = set(itertools.product(range(3 if grid_codec.codebook.width == 8 else 8), repeat=grid_codec.codebook.width))
    book, half = grid_codec.codebook, grid_codec.level_count // 2
    ranks = book.vectors >> 1 if book.lift else book.vectors - half
    rank = np.array(sorted(absent - set(map(tuple, ranks.tolist())))[0], np.uint8)
    wrong, last = codes.copy(), codes.shape[1] - 8
    wrong[-1, -book.width :] = 2 * rank + (codes[-1, -1] & 1) if book.lift else rank + half
    flipped = codes.copy()
    flipped[-1, -1] = flipped[-1, -1] ^ 1 if book.lift else grid_codec.level_count - 1 - flipped[-1, -1]
    for bad in (wrong, flipped)[: 2 if book.lift or book.even else 1]:
        message = rf"row {len(codes) - 1}, columns .*{last + 7 if book.lift != 32 or bad is wrong else ''}.* not in"
        with pytest.raises(ValueError, match=message):
            grid_codec.encode(grid, bad)
    with pytest.raises(ValueError, match="another codebook"):
        grid_codec.encode(dataclasses.replace(grid, codebook=None), codes)


def test_nearest_to_a_weight_beyond_float32_steps_is_the_end_of_the_grid() -> None:
    scale = Scales(ScaleFormat(32), np.full((1, 1), 2.0**-24, np.float16), np.ones((1, 1), np.int16))
    weights = np.repeat(np.array([[-3e38, 3e38]], dtype=np.float32), 16, axis=1)
    for name, last in {"gguf:Q8_0": 255, "gguf:IQ4_NL": 15}.items():
        grid = Grid(32, codec_named(name).levels, scale)
        assert np.array_equal(grid.nearest(weights), np.repeat([[0, last]], 16, axis=1))


@every_grid
def test_values_are_scale_times_level_plus_offset_in_float32(name: str) -> None:
    _, grid, codes = random_case(name, 3)
    values = grid.values(codes)
    for (row, column), code in np.ndenumerate(codes):
        expected = (grid.levels if grid.levels.ndim == 1 else grid.levels[row])[code]
        if grid.scale is not None:
            expected = stored_number(grid.scale, row, column, codes.shape[1]) * expected
        if grid.offset is not None:
            expected = expected + stored_number(grid.offset, row, column, codes.shape[1])
        if grid.whole != 1:
            expected = expected * np.float32(grid.whole)
        assert same_bits(values[row, column], expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mxint_by_hand(bits: int) -> None:
    """A group with e = 3 holds multiples of 2^(3 - (B - 1)). The largest value is one of them, below 8."""
    largest = 2 ** (bits - 1) - 1
    codes = np.array([[0, largest, 2 * largest] + [largest] * 13], dtype=np.uint8)
    planes = {"codes": pack_bits(codes, bits), "exponents": np.array([[3 + 127]], dtype=np.uint8)}
    step = 2.0 ** (3 - (bits - 1))
    expected = np.array([[-largest * step, 0, largest * step] + [0] * 13], dtype=np.float32)
    assert np.array_equal(codec_named(f"native:mxint-{bits}-g16").decode(planes, 16), expected)
    assert largest * step + step == 8


def test_what_mxint_cannot_mean_is_refused() -> None:
    mxint, planes = codec_named("native:mxint-4-g16"), {"codes": np.zeros((1, 8), np.uint8)}
    for exponent in (127 - 22, 127 + 19):
        with pytest.raises(ValueError, match="out of its range"):
            mxint.decode(planes | {"exponents": np.array([[exponent]], np.uint8)}, 16)
    with pytest.raises(ValueError, match="has no value"):
        mxint.decode({"codes": np.full((1, 8), 255, np.uint8), "exponents": np.array([[127]], np.uint8)}, 16)
    _, grid, codes = random_case("native:mxint-4-g16", 1)
    for supers in (np.float16(3) * grid.scale.supers, -grid.scale.supers, 0 * grid.scale.supers):
        odd = dataclasses.replace(grid, scale=dataclasses.replace(grid.scale, supers=supers.clip(-1e4, 1e4)))
        with pytest.raises(ValueError, match="not among the powers of two"):
            mxint.encode(odd, codes)


def stored_number(scales: Scales, row: int, column: int, columns: int) -> np.float32:
    group = column // (scales.format.group or columns)
    number = np.float32(scales.supers[row, group // scales.format.span]) * np.float32(scales.subs[row, group])
    return np.float32(scales.format.sign) * number


# GGUF compared with gguf-py and ggml.


@every_block_type
@pytest.mark.parametrize("seed", range(10))
def test_decoding_random_blocks_equals_gguf_and_libgguf_bitwise(name: str, seed: int) -> None:
    blocks, block_type = random_blocks(name, seed), codec_named(name)
    decoded = block_type.decode({"blocks": blocks}, 3 * block_type.block)
    if name != "gguf:Q1_0":  # gguf-py 0.19 has its size alone
        assert same_bits(decoded, dequantize(blocks, ggml_type(name)))
    assert same_bits(decoded, libgguf.dequantize_rows(blocks, ggml_type(name)))


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in WITH_UNUSED_BITS])
@examples
@given(seed=seeds)
def test_every_bit_of_a_block_is_kept(name: str, seed: int) -> None:
    blocks, block_type = random_blocks(name, seed), codec_named(name)
    again = block_type.encode(*block_type.unpack({"blocks": blocks}, 3 * block_type.block))
    assert same_bits(again["blocks"], blocks)


@pytest.mark.parametrize("name", WITH_UNUSED_BITS)
def test_every_bit_that_ggml_writes_is_kept(name: str) -> None:
    block_type, weights = codec_named(name), np.random.default_rng(0).normal(0, 0.05, (3, 512)).astype(np.float32)
    blocks = np.ascontiguousarray(libgguf.quantize_rows(weights, ggml_type(name))).reshape(3, -1)
    assert same_bits(block_type.encode(*block_type.unpack({"blocks": blocks}, 512))["blocks"], blocks)


def test_bytes_that_ggml_never_writes_decode_as_in_ggml_and_are_not_written_again() -> None:
    """The code 3 of TQ2_0, and a scale of NVFP4 that stands for NaN."""
    for name, block in {"gguf:TQ2_0": [255] * 64 + [0, 0x3C], "gguf:NVFP4": [127, 255, 128, 1] + [0x77] * 32}.items():
        blocks, block_type = np.array([block], np.uint8), codec_named(name)
        decoded = block_type.decode({"blocks": blocks}, block_type.block)
        assert same_bits(decoded, libgguf.dequantize_rows(blocks, ggml_type(name)))
        with pytest.raises(ValueError, match=r"too large|A scale of gguf:NVFP4 is not among the numbers of 4 bits"):
            block_type.encode(*block_type.unpack({"blocks": blocks}, block_type.block))


def test_the_floats_of_nvfp4_are_those_of_its_bytes() -> None:
    floats = codec_named("gguf:NVFP4").scale.floats
    scales = codec_named("gguf:NVFP4").small_scales[:127]
    assert floats.holds(scales).all()
    assert not floats.holds((scales[1:] + scales[:-1]) / 2).any()
    assert not floats.holds(np.array([-1, 240, np.inf, np.nan], np.float32)).any()


@every_block_type
def test_block_sizes_are_ggufs(name: str) -> None:
    block_type = codec_named(name)
    assert (block_type.block, block_type.members.itemsize) == gguf.GGML_QUANT_SIZES[ggml_type(name)]


def test_what_a_file_spends_on_a_weight() -> None:
    spent = {name: round(bits_per_weight(codec_named(name), 4096, 4096), 4) for name in names()}
    assert spent["gguf:Q2_K"] == 2.625
    assert spent["gguf:Q3_K"] == 3.4375
    assert spent["gguf:Q4_K"] == 4.5
    assert spent["gguf:BF16"] == 16
    assert spent["native:table-3"] == round(3 + 8 * 16 / 4096, 4)
    assert spent["native:affine-3-g128"] == 3.25
    assert spent["native:mxint-4-g16"] == 4.5
    assert spent["native:mxint-3-g32"] == 3.25
    assert spent["native:affine-4-row"] == round(4 + 32 / 4096, 4)


# Plain types.


def hard_floats() -> np.ndarray:
    """Returns float32 [3, n]: the rounding borders of float16, many of bfloat16, and their neighbours on both sides."""
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)].astype(np.float32)
    middles = np.sort(half)[:-1] / 2 + np.sort(half)[1:] / 2
    brain = (np.arange(0, 0x7F7F, 7, dtype=np.uint32) << 16) + np.uint32(0x8000)
    patterns = np.concatenate([middles.view(np.uint32), brain, brain | 0x80000000])
    patterns = np.concatenate([patterns, patterns - 1, patterns + 1])
    return patterns[: len(patterns) // 3 * 3].view(np.float32).reshape(3, -1)


@pytest.mark.parametrize(("name", "dtype"), [("gguf:F16", torch.float16), ("gguf:BF16", torch.bfloat16)])
def test_plain_types_round_as_torch_gguf_and_ggml_do(name: str, dtype: torch.dtype) -> None:
    weights = hard_floats()
    weights = np.where(np.abs(weights) < 65504, weights, np.float32(0.1)) if name == "gguf:F16" else weights
    blocks = codec_named(name).encode_values(weights)["blocks"]
    assert same_bits(blocks.view(np.int16), torch.from_numpy(weights).to(dtype).view(torch.int16).numpy())
    assert blocks.tobytes() == quantize(weights, ggml_type(name)).tobytes()
    assert blocks.tobytes() == libgguf.store_rows(weights, ggml_type(name)).tobytes()


def test_a_bfloat16_nan_stays_a_quiet_nan_as_in_ggml() -> None:
    patterns = np.array([[0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC12345]], dtype=np.uint32)
    blocks = codec_named("gguf:BF16").encode_values(patterns.view(np.float32))["blocks"]
    assert same_bits(blocks.view("<u2"), np.array([[0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF, 0x7FC1]], dtype="<u2"))
    assert same_bits(blocks, quantize(patterns.view(np.float32), ggml_type("gguf:BF16")))
    assert same_bits(blocks, libgguf.store_rows(patterns.view(np.float32), ggml_type("gguf:BF16")))


@pytest.mark.parametrize(("name", "dtype"), [("gguf:F16", torch.float16), ("gguf:BF16", torch.bfloat16)])
def test_every_16_bit_pattern_decodes_as_in_gguf_and_torch(name: str, dtype: torch.dtype) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).reshape(4, -1)
    decoded = codec_named(name).decode({"blocks": patterns.view(np.uint8)}, patterns.shape[1])
    assert same_bits(decoded, dequantize(patterns.view(np.uint8), ggml_type(name)))
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).to(torch.float32).numpy()
    assert np.array_equal(decoded, expected, equal_nan=True)


def test_float32_is_kept_bitwise() -> None:
    weights = np.random.default_rng(0).integers(0, 2**32, (3, 50), dtype=np.uint32).view(np.float32)
    assert same_bits(codec_named("gguf:F32").decode(codec_named("gguf:F32").encode_values(weights), 50), weights)


@pytest.mark.parametrize(("name", "largest", "too_large"), [("gguf:F16", 65519, 65520), ("gguf:BF16", 3.39e38, 3.4e38)])
def test_a_finite_weight_never_becomes_infinite(name: str, largest: float, too_large: float) -> None:
    plain: PlainCodec = codec_named(name)
    kept = plain.decode(plain.encode_values(np.array([[largest, -np.inf]], dtype=np.float32)), 2)
    assert np.isfinite(kept[0, 0])
    assert kept[0, 1] == -np.inf
    with pytest.raises(ValueError, match="would become infinite"):
        plain.encode_values(np.array([[0, -too_large]], dtype=np.float32))


# Literal bytes: they catch a format that changes silently, even without another implementation.


def test_every_codec_has_a_golden_vector() -> None:
    assert sorted(GOLDEN) == sorted(name for name in names() if name not in names("mlx"))


@every_codec
def test_golden_vector(name: str) -> None:
    golden = GOLDEN[name]
    planes = {
        key: np.frombuffer(bytes.fromhex(content), dtype).reshape(shape)
        for key, (dtype, shape, content) in golden["planes"].items()
    }
    expected = np.frombuffer(bytes.fromhex(golden["float32"]), "<f4").reshape(-1, golden["columns"])
    assert same_bits(codec_named(name).decode(planes, golden["columns"]), expected)


def half(*numbers: float) -> np.ndarray:
    return np.array([numbers], dtype=np.float16)


def test_a_three_bit_table_by_hand() -> None:
    """Codes 0 .. 7, 7 and 5, of 3 bits each, start at the lowest bit of the first byte and cross byte borders."""
    planes = {"codes": np.array([[0b10001000, 0b11000110, 0b11111010, 0b101111]], dtype=np.uint8)}
    planes["table"] = half(-4, -2, -1, -0.0, 0.5, 1, 2, 4)
    expected = np.array([[-4, -2, -1, -0.0, 0.5, 1, 2, 4, 4, 1]], dtype=np.float32)
    assert same_bits(codec_named("native:table-3").decode(planes, 10), expected)


BY_HAND = {2: [0b11_10_01_00], 3: [0b10_001_000, 0b11_0], 4: [0x10, 0x32], 5: [0b001_00000, 0b1_00010_00, 0b1]}
BY_HAND |= {6: [0b01_000000, 0b0010_0000, 0b000011_00], 8: [0, 1, 2, 3]}


@pytest.mark.parametrize("bits", BY_HAND)
def test_affine_rows_by_hand(bits: int) -> None:
    """Codes 0, 1, 2 and 3 with scale -0.5 and offset 1.25."""
    planes = {"codes": np.array([BY_HAND[bits]], dtype=np.uint8), "scale": half(-0.5), "offset": half(1.25)}
    expected = np.array([[1.25, 0.75, 0.25, -0.25]], dtype=np.float32)
    assert same_bits(codec_named(f"native:affine-{bits}-row").decode(planes, 4), expected)


def test_a_negative_zero_scale_gives_zeros_of_the_opposite_sign() -> None:
    blocks = np.frombuffer(bytes([0x00, 0x80, *[0xF0] * 16]), np.uint8)[None]  # d = -0.0; q = -8, then 7
    expected = np.repeat(np.array([[0.0, -0.0]], dtype=np.float32), 16, axis=1)
    assert same_bits(codec_named("gguf:Q4_0").decode({"blocks": blocks}, 32), expected)


# Bad input, refused with one sentence each.


@every_codec
def test_a_shape_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="empty matrix"):
        codec_named(name).layout(4, 0)
    with pytest.raises(ValueError, match="empty matrix"):
        codec_named(name).layout(0, 256)
    if codec_named(name).block > 1:
        with pytest.raises(
            ValueError,
            match=rf"multiple of {codec_named(name).block} weights, not {codec_named(name).block + 8}\.",
        ):
            codec_named(name).layout(4, codec_named(name).block + 8)


@every_codec
def test_planes_of_another_shape_are_refused(name: str) -> None:
    columns = 2 * codec_named(name).block
    planes = {key: np.ones(shape, dtype) for key, (dtype, shape) in codec_named(name).layout(3, columns).items()}
    if "exponents" in planes:
        planes["exponents"][:] = 127
    assert codec_named(name).decode(planes, columns).shape == (3, columns)
    with pytest.raises(ValueError, match="has the planes"):
        codec_named(name).decode({**planes, "more": planes[next(iter(planes))]}, columns)
    for key, plane in planes.items():
        for wrong in (plane[:, :-1], plane.astype(np.int64), plane[0]):
            with pytest.raises(ValueError, match=r"Plane|multiple|empty"):
                codec_named(name).decode({**planes, key: wrong}, columns)
    with pytest.raises(ValueError, match=r"has the planes|empty"):
        codec_named(name).decode({}, columns)


@every_grid
def test_codes_that_do_not_fit_are_refused(name: str) -> None:
    grid_codec, grid, codes = random_case(name, 1)
    with pytest.raises(ValueError, match="uint8"):
        grid_codec.encode(grid, codes.astype(np.int32))
    with pytest.raises(ValueError, match="columns"):
        grid_codec.encode(dataclasses.replace(grid, columns=grid.columns + grid_codec.block), codes)
    if grid_codec.level_count < 256:
        codes[-1, -1] = grid_codec.level_count
        with pytest.raises(ValueError, match=f"Code {grid_codec.level_count} is too large"):
            grid_codec.encode(grid, codes)


@every_grid
def test_a_grid_of_another_format_is_refused(name: str) -> None:
    grid_codec, grid, codes = random_case(name, 1)
    with pytest.raises(ValueError, match=r"other levels|table"):
        grid_codec.encode(dataclasses.replace(grid, levels=grid.levels + 1e6), codes)
    with pytest.raises(ValueError, match=r"other levels|table"):
        grid_codec.encode(dataclasses.replace(grid, levels=grid.levels.astype(np.float64)), codes)
    another = Scales(ScaleFormat(7), np.zeros((1, 1), np.float16), np.ones((1, 1), np.int16))
    for field in ("scale", "offset"):
        with pytest.raises(ValueError, match=f"another {field} format"):
            grid_codec.encode(dataclasses.replace(grid, **{field: another}), codes)
        if getattr(grid, field) is not None:
            with pytest.raises(ValueError, match=f"another {field} format"):
                grid_codec.encode(dataclasses.replace(grid, **{field: None}), codes)


@pytest.mark.parametrize("field", ["scale", "offset"])
@every_grid
def test_numbers_that_the_file_cannot_store_are_refused(name: str, field: str) -> None:
    grid_codec, grid, codes = random_case(name, 1)
    scales = getattr(grid, field)
    if scales is None:
        with pytest.raises(ValueError, match=f"another {field} format"):
            grid_codec.encode(dataclasses.replace(grid, **{field: Scales(ScaleFormat(32), codes, codes)}), codes)
        return
    infinite, above, below = scales.supers.copy(), scales.subs.copy(), scales.subs.copy()
    infinite[-1, -1] = np.inf
    above[-1, -1] = scales.format.high + 1
    below[-1, -1] = scales.format.low - 1
    wrong = [
        ("not a number", {"supers": infinite}),
        ("must lie in", {"subs": above}),
        ("must lie in", {"subs": below}),
        ("must be float", {"supers": scales.supers.astype(np.float64)}),
        ("must be int16", {"subs": scales.subs[:, :-1]}),
    ]
    for message, change in wrong:
        with pytest.raises(ValueError, match=message):
            grid_codec.encode(dataclasses.replace(grid, **{field: dataclasses.replace(scales, **change)}), codes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0, 0.1, 1, 2], "float16: round"),
        ([0, 2, 1, 3], "ascend"),
        ([0, 1, 2, 1e5], "finite"),
        ([0, 1, 2], "has a table"),
    ],
)
def test_a_table_that_the_file_cannot_store_is_refused(table: list[float], message: str) -> None:
    grid = Grid(8, np.array([table], dtype=np.float32))
    with pytest.raises(ValueError, match=message):
        codec_named("native:table-2").encode(grid, np.zeros((1, 8), dtype=np.uint8))


def test_plain_types_take_float32_matrices_only() -> None:
    for weights in (np.zeros((2, 2)), np.zeros(2, dtype=np.float32)):
        with pytest.raises(ValueError, match="stores float32"):
            codec_named("gguf:F16").encode_values(weights)


def test_unknown_names_are_answered_with_near_ones() -> None:
    for wrong, near in {"Q4_K": "gguf:Q4_K", "gguf:q6_k": "gguf:Q6_K", "native:table3": "native:table-3"}.items():
        with pytest.raises(ValueError, match=f"Unknown format '{wrong}'. Did you mean {near}, .+ or .+"):
            codec_named(wrong)
    with pytest.raises(ValueError, match=r"Known are such as native:table-3, gguf:Q6_K\."):
        codec_named("something else")


def test_names_of_a_family() -> None:
    families = ("gguf", "gguf-norm", "gguf-decay", "gguf-whole", "gguf-scaled", "native", "mlx")
    assert {name for family in families for name in names(family)} == set(names())
    assert names("gguf-norm") == ["gguf-norm:F32"]
    assert names("gguf-scaled") == ["gguf-scaled:NVFP4"]
    assert names("gguf")[:4] == ["gguf:F32", "gguf:F16", "gguf:BF16", "gguf:Q4_0"]
    assert names("gg") == []
    assert all(codec_named(name).name == name for name in names())
