"""MLX's codecs: their laws, and their values beside those of mlx.core.dequantize, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as of_tests
from hypothesis import strategies as st

from lqexport.converters.checkpoints.mlx import Mlx
from lqexport.converters.mlx.types import settings
from lqexport.formats import bfloat16
from lqexport.formats.codec import BFLOAT16, FLOAT16, Grid, GridCodec, Rounding, ScaleFormat, Scales, bits_per_weight
from lqexport.formats.mlx import BITS
from lqexport.formats.mlx_floats import E4M3_MAGNITUDES
from lqexport.formats.moves import AffineGrid, move
from lqexport.formats.registry import codec_named, names
from lqexport.grids.fit import fit
from lqexport.grids.grid import TensorGrid
from lqexport.grids.reach import reach
from lqexport.solver import feedback as solve
from lqexport.solver import solve_cpu, solve_torch
from lqexport.solver.cholesky import factorize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mlx.json").read_text())
ALL = names("mlx")
every_type = pytest.mark.parametrize("name", ALL)
examples = of_tests(max_examples=6, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
FEW = ["mlx:2-g64", "mlx:4-g32-f16", "mlx:8-g64", "mlx:mxfp4", "mlx:nvfp4", "mlx:mxfp8"]

pytestmark = pytest.mark.filterwarnings("error")


def numbers(rng: np.random.Generator, scale_format: ScaleFormat, shape: tuple[int, int]) -> Scales:
    """Returns stored numbers: of the size of real ones, or of any finite bits, zeros and the extremes among them."""
    bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
    usual = rng.normal(0, 0.02, shape).astype(np.float32)
    either = rng.random(shape) < rng.choice([0, 0.5, 1])
    if scale_format.floats == BFLOAT16:
        supers = np.where(either, bfloat16.rounded(usual), bfloat16.of_bits(bits))
    elif scale_format.floats == FLOAT16:
        supers = np.where(either, usual.astype(np.float16), bits.view(np.float16))
    elif scale_format.floats.mantissa:
        supers = rng.choice(np.concatenate([E4M3_MAGNITUDES, -E4M3_MAGNITUDES]), shape)
    else:
        supers = np.ldexp(np.float32(1), np.where(either, rng.integers(-20, 5, shape), rng.integers(-127, 128, shape)))
    if scale_format.floats in (BFLOAT16, FLOAT16):
        least, most = 2.0 ** (scale_format.floats.lowest - scale_format.floats.mantissa), scale_format.floats.most
        special = rng.choice([0.0, -0.0, least, -least, most, -most], shape)
        supers = np.where(rng.random(shape) < 0.1, special, supers)
    supers = np.where(np.isfinite(supers), supers, 0).astype(scale_format.dtype)
    return Scales(scale_format, supers, np.ones(shape, np.int16))


def random_case(name: str, seed: int) -> tuple[GridCodec, Grid, np.ndarray]:
    rng, codec = np.random.default_rng(seed), codec_named(name)
    assert isinstance(codec, GridCodec)
    assert codec.scale is not None
    rows, columns = int(rng.integers(1, 6)), codec.block * int(rng.integers(1, 4))
    shape = rows, codec.scale.groups(columns)
    offset = numbers(rng, codec.offset, shape) if codec.offset else None
    codes = rng.integers(0, codec.level_count, (rows, columns), dtype=np.uint8)
    return codec, Grid(columns, codec.levels, numbers(rng, codec.scale, shape), offset, rounding=codec.rounding), codes


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def mlx() -> Any:
    return pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'lqexport[mlx]')")


def dequantized(name: str, planes: dict[str, np.ndarray]) -> np.ndarray:
    """Returns what mlx.core.dequantize makes of the planes of a codec, float32."""
    mx, stored = mlx(), settings(name)
    if stored["mode"] != "affine":
        # mlx wants an even number of groups of 16: each row stands there twice.
        packed, scales = (mx.array(planes[plane].repeat(2, axis=0)) for plane in ("weight", "scales"))
        return np.array(mx.dequantize(packed, scales, **stored).astype(mx.float32))[::2]
    dtype = mx.float16 if name.endswith("-f16") else mx.bfloat16
    scales, biases = (mx.array(planes[plane].view(np.uint16)).view(dtype) for plane in ("scales", "biases"))
    values = mx.dequantize(mx.array(planes["weight"]), scales, biases, **stored)
    assert values.dtype == dtype
    return np.array(values.astype(mx.float32))


@every_type
@examples
@given(seed=seeds)
def test_what_was_encoded_comes_back(name: str, seed: int) -> None:
    codec, grid, codes = random_case(name, seed)
    planes = codec.encode(grid, codes)
    with np.errstate(all="ignore"):  # numbers of any bits may make infinite values
        assert same_bits(codec.decode(planes, codes.shape[1]), grid.values(codes))
        unpacked, unpacked_codes = codec.unpack(planes, codes.shape[1])
        assert same_bits(unpacked_codes, codes)
        assert (unpacked.rounding, unpacked.columns) == (grid.rounding, grid.columns)
        for stored, restored in ((grid.scale, unpacked.scale), (grid.offset, unpacked.offset)):
            if stored is not None:
                assert same_bits(restored.supers, stored.supers)
        assert {key: (plane.dtype, plane.shape) for key, plane in planes.items()} == codec.layout(*codes.shape)
        order = np.random.default_rng(seed).permutation(len(codes))
        moved = codec.decode({key: plane[order] for key, plane in planes.items()}, codes.shape[1])
        assert same_bits(moved, grid.values(codes)[order])


@every_type
@examples
@given(seed=seeds)
def test_mlx_decodes_the_same_bits(name: str, seed: int) -> None:
    codec, grid, codes = random_case(name, seed)
    planes = codec.encode(grid, codes)
    theirs = dequantized(name, planes)
    with np.errstate(all="ignore"):
        assert same_bits(codec.decode(planes, codes.shape[1]), theirs)


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_vectors(name: str) -> None:
    """Values of mlx.core.dequantize, for machines without mlx."""
    planes = {
        plane: np.frombuffer(bytes.fromhex(content), dtype).reshape(shape)
        for plane, (dtype, shape, content) in GOLDEN[name]["planes"].items()
    }
    values = codec_named(name).decode(planes, GOLDEN[name]["columns"])
    assert values.tobytes().hex() == GOLDEN[name]["float32"]


def test_every_codec_has_a_golden_vector() -> None:
    assert set(GOLDEN) == set(names("mlx"))


def test_codes_of_mlxs_quantizer_are_read(tmp_path: Path) -> None:
    """3-bit codes cross words. mlx's own quantizer packs them, and its own decoder is what ours must equal."""
    mx = mlx()
    weights = mx.random.normal((8, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(weights, group_size=64, bits=3)
    planes = {"weight": np.array(packed)}
    planes |= {"scales": np.array(scales.view(mx.uint16)), "biases": np.array(biases.view(mx.uint16))}
    assert same_bits(codec_named("mlx:3-g64").decode(planes, 128), dequantized("mlx:3-g64", planes))


class Stored(dict[str, torch.Tensor]):
    """The tensors of a checkpoint."""

    def stored_tensor(self, name: str) -> torch.Tensor:
        return self[name]

    def stored_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)


def test_sources_of_float32_are_read_as_mlx_decodes_them() -> None:
    """They have no codec, since lqexport writes none."""
    mx = mlx()
    planes = mx.quantize(mx.random.normal((8, 128), key=mx.random.key(1)), group_size=64, bits=5)
    stored = {f"X.{part}": torch.from_numpy(np.array(plane)) for part, plane in zip(Mlx.parts, planes, strict=True)}
    layout = Mlx(Stored(stored), stored, {"bits": 5, "group_size": 64})
    assert same_bits(layout.read("X"), np.array(mx.dequantize(*planes, group_size=64, bits=5)))


def test_both_roundings_count() -> None:
    """By hand: 255 * 1.0078125 (a bfloat16) is 256.99; its bfloat16 is 256, or 257 at 8 bits after 2^8: 256."""
    grid = Grid(32, np.arange(256, dtype=np.float32), *_of(1.0078125, 0.5), rounding=Rounding.BFLOAT_STEPS)
    codes = np.full((1, 32), 255, np.uint8)
    assert grid.values(codes)[0, 0] == 256  # neither 256.99 + 0.5 nor its bfloat16, 258
    once = Grid(32, grid.levels, grid.scale, grid.offset)
    assert bfloat16.rounded(once.values(codes))[0, 0] == 258


def _of(scale: float, offset: float) -> tuple[Scales, Scales]:
    one = np.ones((1, 1), np.int16)
    form = ScaleFormat(32, floats=BFLOAT16)
    return tuple(Scales(form, np.full((1, 1), number, np.float32), one) for number in (scale, offset))  # type: ignore[return-value]


def test_a_number_that_is_no_bfloat16_is_refused() -> None:
    codec, grid, codes = random_case("mlx:4-g32", 3)
    scale = Scales(grid.scale.format, np.full_like(grid.scale.supers, 0.1), grid.scale.subs)
    with pytest.raises(ValueError, match="not among the bfloat16 numbers"):
        codec.encode(Grid(grid.columns, grid.levels, scale, grid.offset, rounding=grid.rounding), codes)
    with pytest.raises(ValueError, match="rounded otherwise"):
        codec.encode(Grid(grid.columns, grid.levels, grid.scale, grid.offset), codes)


def test_what_a_file_spends_on_a_weight() -> None:
    assert bits_per_weight(codec_named("mlx:4-g64"), 64, 128) == 4.5
    assert bits_per_weight(codec_named("mlx:3-g32-f16"), 64, 128) == 4
    assert bits_per_weight(codec_named("mlx:6-g128"), 64, 128) == 6.25
    for mode, bits in {"mxfp4": 4.25, "nvfp4": 4.5, "mxfp8": 8.25}.items():
        assert bits_per_weight(codec_named(f"mlx:{mode}"), 64, 128) == bits


@pytest.mark.parametrize("name", ["mlx:mxfp4", "mlx:nvfp4", "mlx:mxfp8"])
def test_bytes_that_are_no_numbers_are_refused(name: str) -> None:
    codec, grid, codes = random_case(name, 1)
    planes = codec.encode(grid, codes)
    with pytest.raises(ValueError, match=f"A scale of {name} is not a number"):
        codec.unpack(planes | {"scales": np.full_like(planes["scales"], 255)}, codes.shape[1])
    if name == "mlx:mxfp8":
        with pytest.raises(ValueError, match="A code of mlx:mxfp8 is not a number"):
            codec.unpack(planes | {"weight": np.full_like(planes["weight"], 0x7F7F7F7F)}, codes.shape[1])


@pytest.mark.parametrize("name", FEW)
def test_torch_has_the_same_values_as_the_format(name: str) -> None:
    codec, grid, codes = random_case(name, 2)
    tensor_grid = TensorGrid.of(grid, torch.device("cpu"))
    with np.errstate(all="ignore"):
        assert np.array_equal(tensor_grid.values(torch.from_numpy(codes)).numpy(), grid.values(codes), equal_nan=True)
    assert tensor_grid.numpy().rounding == codec.rounding


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [16, 256] and the second moments of correlated inputs."""
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(700, 256, generator=draw) @ (torch.randn(256, 256, generator=draw) / 16 + torch.eye(256))
    return torch.randn(16, 256, generator=draw), inputs.T @ inputs / 700


@pytest.mark.parametrize("name", FEW)
def test_the_backends_agree_and_descent_lowers_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hessian = problem()
    codec = codec_named(name)
    assert isinstance(codec, GridCodec)
    results = []
    for backend in (solve_cpu, solve_torch):
        monkeypatch.setattr(solve, "backend", lambda _, backend=backend: backend)
        grid = fit(codec, weights, hessian.diagonal())
        codes = solve.feedback(weights, grid, factorize(hessian.double(), 0.01, True))
        refined, better = solve.refine(weights, hessian, grid, codes, sweeps=2, refit=True)
        losses = [
            solve.layer_loss((g.values(c) - weights).double(), hessian.double())
            for g, c in ((grid, codes), (refined, better))
        ]
        assert losses[1] < losses[0]
        planes = codec.encode(refined.numpy(), better.numpy())
        assert np.array_equal(codec.decode(planes, 256), refined.values(better).numpy())
        results.append((codes, losses[1]))
    assert (results[0][0] == results[1][0]).float().mean() > 0.99
    assert results[0][1] == pytest.approx(results[1][1], rel=0.02)


def test_more_bits_lose_less() -> None:
    weights, hessian = problem()
    errors = []
    for bits in BITS:
        grid = fit(codec_named(f"mlx:{bits}-g64"), weights, hessian.diagonal())
        errors.append(float((grid.values(grid.nearest(weights)) - weights).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_no_other_grid_moves_here() -> None:
    """A product that is rounded has other values than the source's."""
    source = AffineGrid(4, np.ones((2, 1), np.float32), np.full((2, 1), 8, np.int16), np.zeros(64, np.int64))
    with pytest.raises(ValueError, match="rounds its values"):
        move(source, codec_named("mlx:4-g64"))


def test_bfloat16_reaches_nearly_as_far_as_float32() -> None:
    assert reach(codec_named("mlx:4-g64"))[1] > 8e37
    assert reach(codec_named("mlx:4-g64-f16")) == (-16376, 16376)
