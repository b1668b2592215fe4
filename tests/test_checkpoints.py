"""Checkpoints that other tools have quantized, as sources: written here by each layout's description, read, moved or
solved again, and decoded by gguf, libgguf and compressed-tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lqexport.artifact import Artifact
from lqexport.cli import app
from lqexport.converters import gguf, native
from lqexport.errors import UserError
from lqexport.exports import open_export
from lqexport.formats.codec import PlainCodec, nbytes
from lqexport.formats.moves import AffineGrid, TableGrid, move
from lqexport.formats.registry import codec, names
from lqexport.inspect import inspect
from lqexport.job import plan_recipe
from lqexport.pipeline import quantize
from lqexport.recipe import Recipe
from lqexport.source import open_source
from lqexport.verifying import verify

Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
ROW = {"strategy": "channel", "group_size": None}
Tensors = dict[str, torch.Tensor]


# The layouts, written down a second time.


@dataclass(frozen=True)
class Coded:
    """A linear in integers: codes [R, C], zero [R, G], scale float16 [R, G], and the group of each column."""

    bits: int
    codes: NDArray[np.int64]
    zero: NDArray[np.int64]
    scale: NDArray[np.float16]
    group_of: NDArray[np.int64]

    @property
    def values(self) -> NDArray[np.float32]:
        integers = (self.codes - self.zero[:, self.group_of]).astype(np.float32)
        return self.scale.astype(np.float32)[:, self.group_of] * integers


def coded(weight: NDArray[np.float32], bits: int, group: int, symmetric: bool, act_order: bool = False) -> Coded:
    """Rounded to nearest."""
    columns = weight.shape[1]
    group = group or columns
    group_of = np.arange(columns) // group
    if act_order:
        group_of = np.random.default_rng(0).permutation(group_of)
    parts = np.stack([weight[:, group_of == g] for g in range(columns // group)], 1)
    low, high, middle = parts.min(2), parts.max(2), 2 ** (bits - 1)
    span = 2 * np.abs(parts).max(2) if symmetric else high - low
    scale = (span / (2**bits - 1)).astype(np.float16)
    zero = np.full(low.shape, middle) if symmetric else np.clip(np.rint(-low / scale), 1, 2**bits - 1)
    codes = np.rint(weight / scale[:, group_of]) + zero[:, group_of]
    return Coded(bits, np.clip(codes, 0, 2**bits - 1).astype(int), zero.astype(int), scale, group_of)


def words(integers: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Lines of integers, each a stream of bits, the lowest first."""
    stream = (integers[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(len(integers), -1).astype(np.uint8), axis=1, bitorder="little").view("<i4")


def gptq_tensors(name: str, linear: Coded, less: int = 1) -> Tensors:
    stored = {
        "qweight": words(linear.codes, linear.bits).T,
        "qzeros": words(linear.zero.T - less, linear.bits),
        "scales": linear.scale.T,
        "g_idx": linear.group_of.astype(np.int32),
    }
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in stored.items()}


def awq_tensors(name: str, linear: Coded) -> Tensors:
    def interleaved(lines: NDArray[np.int64]) -> NDArray[np.int32]:
        eights = lines.reshape(len(lines), -1, 8)
        return words(eights[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(lines.shape), 4)

    stored = {"qweight": interleaved(linear.codes.T), "qzeros": interleaved(linear.zero.T), "scales": linear.scale.T}
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in stored.items()}


def leanquant_tensors(name: str, weight: NDArray[np.float32], bits: int, dtype: torch.dtype) -> tuple[Tensors, Any]:
    """With the values that LeanQuant's loader makes of them."""
    draw = np.random.default_rng(len(name))
    grid = np.quantile(weight, (np.arange(2**bits) + 0.5) / 2**bits, axis=1).T.astype(np.float32)
    grid = torch.from_numpy(draw.permuted(grid, axis=1)).to(dtype)
    read = grid.half().float().numpy()
    codes = np.abs(weight[:, :, None] - read[:, None]).argmin(2)
    pairs = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    stored = {f"{name}.quant_grid": grid, f"{name}.weight_codes": torch.from_numpy(pairs)}
    return stored, np.take_along_axis(read, codes, axis=1)


@dataclass(frozen=True)
class Checkpoint:
    """A written folder, and every tensor as its values were meant."""

    folder: Path
    values: dict[str, NDArray[np.float32]]


Made = tuple[Tensors, NDArray[np.float32]]
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """Writes the tiny model with every linear as a function says, and its config.json with a quantization_config."""

    def made(tensors_of: Callable[[str, NDArray[np.float32]], Made], quantization: dict[str, Any] | None) -> Checkpoint:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_model, folder)
        stored: Tensors = {}
        values = {}
        for name, tensor in load_file(tiny_model / "model.safetensors").items():
            values[name] = tensor.float().numpy()
            if "proj" in name:
                parts, values[name] = tensors_of(name.removesuffix(".weight"), values[name])
                stored |= parts
            else:
                stored[name] = tensor
        save_file({name: part.contiguous() for name, part in stored.items()}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        extra = {"quantization_config": quantization} if quantization else {}
        (folder / "config.json").write_text(json.dumps(config | extra))
        return Checkpoint(folder, values)

    return made


@pytest.fixture
def make_gptq(make: Make) -> Make:
    def made(bits: int = 4, group: int = 128, symmetric: bool = False, act_order: bool = False, v2: bool = False):  # type: ignore[no-untyped-def]
        def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
            linear = coded(weight, bits, group, symmetric, act_order)
            return gptq_tensors(name, linear, 0 if v2 else 1), linear.values

        config = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric,
                  "desc_act": act_order, "checkpoint_format": "gptq_v2" if v2 else "gptq"}  # fmt: skip
        return make(tensors_of, config)

    return made


@pytest.fixture
def make_awq(make: Make) -> Make:
    def made(powers: bool = False) -> Checkpoint:
        def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
            linear = coded(weight, 4, 128, False)
            if powers:  # zero points that are powers of two
                linear.zero[:] = np.array([1, 2, 4, 8])[np.arange(linear.zero.size) % 4].reshape(linear.zero.shape)
            return awq_tensors(name, linear), linear.values

        return make(tensors_of, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"})

    return made


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return np.array_equal((a + 0.0).view(np.uint32), (b + np.float32(0)).view(np.uint32))


def check_lossless(checkpoint: Checkpoint, target: str, out: Path) -> Artifact:
    """Quantizes without calibration, and every tensor decodes to the checkpoint's values."""
    recipe = Recipe(str(checkpoint.folder), target)
    quantize(recipe, out)
    artifact = Artifact(out)
    assert artifact.run()["calibration"] is None
    entries = {entry["name"]: entry for entry in artifact.report()["tensors"]}
    export = open_export(out)
    assert set(export.names()) == set(checkpoint.values)
    for name, values in checkpoint.values.items():
        assert same_bits(export.read(name).numpy(), values), name
        assert entries[name].get("source_grid") == ("kept" if "proj" in name else None)
        assert entries[name]["codec"] == target or "proj" not in name
    return artifact


def check_gguf(artifact: Artifact, checkpoint: Checkpoint, path: Path) -> None:
    """Every linear as gguf (NumPy) and libgguf (ggml in C) decode it from the file."""
    gguf.write(artifact, path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    theirs = {"mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up", "self_attn.v_proj": "attn_v",
              "self_attn.q_proj": "attn_q"}  # fmt: skip
    for module, name in theirs.items():
        found = tensors[f"blk.1.{name}.weight"]
        expected = checkpoint.values[f"model.layers.1.{module}.weight"]
        if name == "attn_q":  # llama.cpp rotates neighbours: rows 0 32 1 33 ... of each head of 64
            expected = expected.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)
        blocks, kind = np.array(found.data), GGMLQuantizationType(found.tensor_type)
        assert same_bits(dequantize(blocks, kind), expected)
        assert same_bits(libgguf.dequantize_rows(blocks, kind), expected)


# What is read.


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_leanquant_tables_move_to_native_ones(bits: int, dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    checkpoint = make(lambda name, weight: leanquant_tensors(name, weight, bits, dtype), None)
    artifact = check_lossless(checkpoint, f"native:table-{bits}", tmp_path / "out")
    native.write(artifact, tmp_path / "model")
    read = open_export(tmp_path / "model")
    assert all(same_bits(read.read(name).numpy(), values) for name, values in checkpoint.values.items())
    wider = move(TableGrid(np.zeros((3, 2**bits), np.float32), 8), codec("native:table-4"))
    assert wider.grid.levels.shape == (3, 16)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "v2", "target"),
    [
        (4, 128, True, False, "gguf:Q4_0"),
        (4, 32, False, False, "gguf:Q5_0"),
        (4, 0, False, True, "gguf:Q4_K"),
        (3, 64, False, True, "gguf:Q4_1"),
        (2, 0, False, False, "gguf:Q2_K"),
        (8, 128, True, True, "gguf:Q8_0"),
    ],
)
def test_gptq_moves_to_gguf(
    bits: int, group: int, symmetric: bool, v2: bool, target: str, make_gptq: Make, tmp_path: Path
) -> None:
    checkpoint = make_gptq(bits, group, symmetric, v2=v2)
    check_gguf(check_lossless(checkpoint, target, tmp_path / "out"), checkpoint, tmp_path / "model.gguf")


def test_awq_moves_to_gguf(make_awq: Make, tmp_path: Path) -> None:
    checkpoint = make_awq()
    check_gguf(check_lossless(checkpoint, "gguf:Q5_0", tmp_path / "out"), checkpoint, tmp_path / "model.gguf")


def test_awq_of_fitting_mins_moves_to_q4_1(make_awq: Make, tmp_path: Path) -> None:
    checkpoint = make_awq(powers=True)
    check_gguf(check_lossless(checkpoint, "gguf:Q4_1", tmp_path / "out"), checkpoint, tmp_path / "model.gguf")


def test_awq_reads_as_compressed_tensors_converts_it(make_awq: Make) -> None:
    """Its converter knows AutoAWQ's order of rows."""
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    checkpoint = make_awq()
    stored = load_file(checkpoint.folder / "model.safetensors")
    theirs = decompressed(autoawq.AutoAWQConverter().process(stored), DOWN, {"num_bits": 4, "symmetric": False})
    ours = open_source(str(checkpoint.folder)).read(f"{DOWN}.weight")
    assert torch.equal(ours.half(), theirs)
    with pytest.raises(UserError, match="quantized by awq: `lqexport quantize` moves"):
        open_export(checkpoint.folder)


@pytest.mark.parametrize("target", ["native:affine-5-g128", "native:affine-8-g32", "gptq:4-g128", "gptq:4-g32"])
def test_gptq_moves_to_native_and_to_itself(target: str, make_gptq: Make, tmp_path: Path) -> None:
    checkpoint = make_gptq()
    if target.startswith("native:"):
        check_lossless(checkpoint, target, tmp_path / "out")
        return
    quantize(Recipe(str(checkpoint.folder), target), tmp_path / "out")
    values = checkpoint.values[f"{DOWN}.weight"].astype(np.float16)  # as readers of the layout compute
    stored = Artifact(tmp_path / "out").read(f"{DOWN}.weight")
    assert same_bits(open_export(tmp_path / "out").read(f"{DOWN}.weight").numpy(), values.astype(np.float32))
    theirs = load_file(checkpoint.folder / "model.safetensors")
    assert np.array_equal(stored.planes["qweight"], theirs[f"{DOWN}.qweight"].numpy())
    if target == "gptq:4-g128":
        for plane, array in stored.planes.items():
            assert np.array_equal(array, theirs[f"{DOWN}.{plane}"].numpy()), plane


def compression(weights: dict[str, Any]) -> dict[str, Any]:
    kind = {"type": "int", "strategy": "group", "group_size": 128, "dynamic": False} | weights
    return {"targets": ["Linear"], "weights": kind}


def decompressed(stored: Tensors, name: str, weights: dict[str, Any], how: str = "pack-quantized") -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    compressor = BaseCompressor.get_value_from_registry(how)
    return compressor.decompress(parts, QuantizationScheme(**compression(weights)))["weight"]


@pytest.mark.parametrize(
    ("how", "dtype", "weights", "target"),
    [
        ("pack-quantized", torch.bfloat16, {"num_bits": 4, "symmetric": True}, "gguf:Q4_0"),
        ("pack-quantized", torch.float16, {"num_bits": 4, "symmetric": False}, "gguf:Q5_0"),
        ("pack-quantized", torch.float16, {"num_bits": 3, "symmetric": False} | ROW, "gguf:Q4_K"),
        ("pack-quantized", torch.float16, {"num_bits": 8, "symmetric": True}, "gguf:Q8_0"),
        ("int-quantized", torch.bfloat16, {"num_bits": 8, "symmetric": True} | ROW, "gguf:Q8_0"),
        ("float-quantized", torch.bfloat16, {"num_bits": 8, "symmetric": True, "type": "float"} | ROW, None),
    ],
)
def test_compressed_tensors_reads_as_its_library_does(
    how: str, dtype: torch.dtype, weights: dict[str, Any], target: str | None, make: Make, tmp_path: Path
) -> None:
    """The library compresses and decompresses."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(**compression(weights))
    compressor = BaseCompressor.get_value_from_registry(how)

    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        group = 0 if weights.get("strategy") == "channel" else 128
        found = coded(weight, weights["num_bits"], group, weights["symmetric"])
        middle = 2 ** (found.bits - 1)
        given = {"weight": torch.from_numpy(weight).to(dtype), "weight_scale": torch.from_numpy(found.scale).to(dtype)}
        if weights.get("type") == "float":
            given["weight_scale"] = given["weight"].abs().amax(1, keepdim=True) / 448
        if not weights["symmetric"]:
            given["weight_zero_point"] = torch.from_numpy(found.zero - middle).to(torch.int8)
        parts = compressor.compress(given, scheme)
        exact = compressor.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}, exact.numpy()

    quantization = {"quant_method": "compressed-tensors", "format": how, "config_groups": {"group_0": None}}
    checkpoint = make(tensors_of, quantization)
    source = open_source(str(checkpoint.folder))
    assert all(same_bits(source.read(name).float().numpy(), values) for name, values in checkpoint.values.items())
    stored = load_file(checkpoint.folder / "model.safetensors")
    assert torch.equal(source.read(f"{DOWN}.weight").to(dtype), decompressed(stored, DOWN, weights, how))
    if target:
        check_lossless(checkpoint, target, tmp_path / "out")


def fp8_tensors(name: str, weight: NDArray[np.float32], high: int, wide: int) -> Made:
    """Block by block."""
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // high), -(-columns // wide))
    values = np.empty_like(weight)
    for i, top in enumerate(range(0, rows, high)):
        for j, left in enumerate(range(0, columns, wide)):
            part = slice(top, top + high), slice(left, left + wide)
            block = torch.from_numpy(weight[part])
            scale[i, j] = block.abs().max() / 448
            codes[part] = (block / scale[i, j]).to(torch.float8_e4m3fn)
            values[part] = codes[part].float().numpy() * scale[i, j].numpy()
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}, values


@pytest.mark.parametrize("block", [[128, 128], [96, 80]])
def test_fp8_is_read_and_solved_again(block: list[int], make: Make, text: Path, tmp_path: Path) -> None:
    """Also where the last blocks are smaller, which transformers does not read."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantization = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    checkpoint = make(lambda name, weight: fp8_tensors(name, weight, *block), quantization)
    source = open_source(str(checkpoint.folder))
    assert set(source.names()) == checkpoint.values.keys()
    assert all(same_bits(source.read(name).float().numpy(), values) for name, values in checkpoint.values.items())
    if block == [128, 128]:
        stored = load_file(checkpoint.folder / "model.safetensors")
        codes, scale = stored[f"{DOWN}.weight"], stored[f"{DOWN}.weight_scale_inv"]
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scale)
        assert same_bits(source.read(f"{DOWN}.weight").float().numpy(), theirs.numpy())
    options = {"calibration": str(text), "samples": 2, "sequence_length": 32, "tune": 0}
    quantize(Recipe(str(checkpoint.folder), "gguf:Q8_0", **options), tmp_path / "out")
    gguf.write(Artifact(tmp_path / "out"), tmp_path / "model.gguf")
    found = verify(tmp_path / "model.gguf", str(checkpoint.folder), text=str(text), windows=1)
    assert found.failed == []
    assert found.evaluations[0].kl < 0.001


# What moves where.

CHECKPOINTS = {
    "4 bits, symmetric, groups of 128": (4, 128, True),
    "4 bits, groups of 128": (4, 128, False),
    "4 bits, a scale per row": (4, 0, False),
    "3 bits, groups of 128": (3, 128, False),
    "2 bits, groups of 64": (2, 64, False),
    "8 bits, symmetric, groups of 128": (8, 128, True),
    "8 bits, groups of 128": (8, 128, False),
}
KINDS = [name for name in names() if not isinstance(codec(name), PlainCodec)]


def affine(bits: int, group: int, symmetric: bool, scale: float = 0.01) -> AffineGrid:
    """Four rows of 512 columns, with every zero point from 1."""
    draw, groups = np.random.default_rng(bits), 512 // (group or 512)
    scales = (scale * draw.uniform(0.5, 1, (4, groups))).astype(np.float16).astype(np.float32)
    zero = 1 + np.arange(4 * groups).reshape(4, groups) % (2**bits - 1)
    zero[:] = 2 ** (bits - 1) if symmetric else zero
    return AffineGrid(bits, scales, zero.astype(np.int16), np.arange(512) // (group or 512))


def holds(source: AffineGrid, name: str) -> bool:
    """Whether a codec holds all values; where it says so, its bytes must."""
    kind = codec(name)
    codes = np.random.default_rng(0).integers(0, 2**source.bits, (4, 512)).astype(np.uint8)
    codes[0, :2] = 0, 2**source.bits - 1
    try:
        found = move(source, kind)
    except ValueError:
        return False
    assert same_bits(kind.decode(kind.encode(found.grid, found.codes(codes)), 512), source.values(codes))
    return True


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_the_table_of_docs_says_what_moves_where(what: str, root: Path) -> None:
    held = [name for name in KINDS if holds(affine(*CHECKPOINTS[what]), name)]
    shown = [name.removeprefix("gguf:") for name in held if name.startswith("gguf:")]
    native_ones = [name for name in held if name.startswith("native:")]
    smallest = min(native_ones, key=lambda name: nbytes(codec(name), 4, 512), default="-").removeprefix("native:")
    line = f"| {what} | {', '.join(shown) or '-'} | {smallest} |"
    assert line in (root / "docs" / "checkpoints.md").read_text()


@pytest.mark.parametrize("name", [*KINDS, "gptq:4-g32", "exl2:4g128x4"])
def test_no_codec_takes_what_it_does_not_hold(name: str) -> None:
    """Scales beyond float16, groups that cross its own, or columns in another order."""
    table = TableGrid(np.zeros((4, 16), np.float32), 512)
    ordered = affine(4, 128, True)
    shuffled = np.random.default_rng(0).permutation(ordered.group_of)
    wrong = [
        AffineGrid(4, ordered.scale * np.float32(1e-7), ordered.zero, ordered.group_of),
        AffineGrid(4, ordered.scale * np.float32(1 + 2**-12), ordered.zero, ordered.group_of),
        AffineGrid(4, ordered.scale, ordered.zero, shuffled),
        AffineGrid(4, ordered.scale, ordered.zero, np.minimum(np.arange(512) // 124, 3)),
        *([] if name == "native:table-4" else [table]),
    ]
    for grid in wrong:
        with pytest.raises(ValueError, match=r"its |has no "):
            move(grid, codec(name))


def test_groups_in_act_order_are_solved_again(make_gptq: Make, text: Path, tmp_path: Path) -> None:
    checkpoint = make_gptq(act_order=True)
    quick = {"samples": 2, "sequence_length": 64, "moments": "normalized", "descent": 1, "calibration": str(text)}
    quantize(Recipe(str(checkpoint.folder), "gguf:Q5_0", tune=0, **quick), tmp_path / "out")
    entry = {entry["name"]: entry for entry in Artifact(tmp_path / "out").report()["tensors"]}[f"{DOWN}.weight"]
    assert "act-order" in entry["source_grid"]
    assert 0 < entry["relative_error"] < 0.01
    # GPTQ's own layout holds them, group numbers and all.
    quantize(Recipe(str(checkpoint.folder), "gptq:4-g128-act"), tmp_path / "gptq")
    stored = load_file(checkpoint.folder / "model.safetensors")
    for plane, array in Artifact(tmp_path / "gptq").read(f"{DOWN}.weight").planes.items():
        assert np.array_equal(array, stored[f"{DOWN}.{plane}"].numpy())


def test_tuning_leaves_what_was_moved(make: Make, text: Path, tmp_path: Path) -> None:
    """One linear in act-order among others that fit."""

    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        linear = coded(weight, 4, 128, True, act_order=name == DOWN)
        return gptq_tensors(name, linear), linear.values

    checkpoint = make(tensors_of, {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True})
    recipe = Recipe(str(checkpoint.folder), "gguf:Q4_0", samples=2, sequence_length=32, moments="normalized",
                    descent=1, tune=2, calibration=str(text))  # fmt: skip
    quantize(recipe, tmp_path / "out")
    read = open_export(tmp_path / "out")
    kept = [name for name in checkpoint.values if same_bits(read.read(name).numpy(), checkpoint.values[name])]
    assert {name for name in checkpoint.values if "proj" in name} - set(kept) == {f"{DOWN}.weight"}
    facts = {name: Artifact(tmp_path / "out").facts(name) for name in checkpoint.values}
    assert "tuned" not in facts[f"{Q_PROJ}.weight"]
    assert Artifact(tmp_path / "out").report()["tuning"]["kept"] == ("tuned" in facts[f"{DOWN}.weight"])


# The commands.


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_take_a_checkpoint(make_gptq: Make, text: Path, tmp_path: Path) -> None:
    checkpoint = make_gptq(symmetric=True)
    said = run("quantize", checkpoint.folder, tmp_path / "out", "--target", "gguf:Q4_0", "--dry-run")
    assert "14 tensors move to gguf:Q4_0 as they are" in said
    assert "solved again" not in said
    said = run("quantize", checkpoint.folder, tmp_path / "out", "--target", "gguf:Q4_K", "--dry-run")
    assert "14 tensors are solved again" in said
    assert "256 columns share one; gguf:Q4_0 would hold it" in " ".join(said.split())
    run("quantize", checkpoint.folder, tmp_path / "out", "--target", "gguf:Q4_0")
    run("to-gguf", tmp_path / "out", tmp_path / "model.gguf")
    found = verify(
        tmp_path / "model.gguf", str(checkpoint.folder), text=str(text), windows=1, artifact=tmp_path / "out"
    )
    assert found.failed == []
    assert {tensor.weight_error for tensor in found.tensors} == {0.0}
    assert found.evaluations[0].kl == 0
    listed = inspect(checkpoint.folder)
    assert (listed.container, listed.entries[0].type) == ("GPTQ folder", "F16")
    assert {entry.type for entry in listed.entries if "proj" in entry.name} == {"gptq:4-g128-sym"}
    stored = load_file(checkpoint.folder / "model.safetensors").values()
    assert sum(entry.nbytes for entry in listed.entries) == sum(tensor.nbytes for tensor in stored)
    assert "hours" in run("plan", checkpoint.folder, "--target", "gguf:Q4_0", "--json")
    # A file as AutoGPTQ called it, with its config beside it.
    (checkpoint.folder / "model.safetensors").rename(checkpoint.folder / "gptq_model-4bit-128g.safetensors")
    config = json.loads((checkpoint.folder / "config.json").read_text())
    (checkpoint.folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    again = open_source(str(checkpoint.folder))
    assert same_bits(again.read(f"{DOWN}.weight").numpy(), checkpoint.values[f"{DOWN}.weight"])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "by bitsandbytes, which is not read.* gptq, awq, compressed-tensors, fp8, LeanQuant",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv and 4 bits; gemm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "format marlin; gptq and gptq_v2"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized; pack"),
    ],
)
def test_other_quantizations_are_refused(quantization: dict[str, Any], message: str, make: Make) -> None:
    checkpoint = make(lambda name, weight: (gptq_tensors(name, coded(weight, 4, 128, True)), weight), quantization)
    with pytest.raises(UserError, match=message):
        open_source(str(checkpoint.folder))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("g_idx", lambda plane: plane + 1, "names a group that is not among the 4"),
        ("g_idx", lambda plane: plane[1:], r"should be torch.int32 \[512\], not torch.int32 \[511\]"),
        ("qzeros", lambda plane: plane[:, 1:], "does not hold lines of 256 integers"),
        ("qweight", lambda plane: plane.float(), "should be torch.int32"),
        ("qweight", lambda plane: plane.flatten(), "should have two dimensions"),
        ("scales", None, "has no tensor .*scales"),
        ("qzeros", lambda plane: plane + 1, "are not all 8, though"),
    ],
)
def test_damaged_checkpoints_are_refused(
    part: str, change: Callable[[torch.Tensor], torch.Tensor] | None, message: str, make_gptq: Make
) -> None:
    checkpoint = make_gptq(symmetric=True)
    path = checkpoint.folder / "model.safetensors"
    stored = load_file(path)
    plane = stored.pop(f"{DOWN}.{part}")
    if change:
        stored[f"{DOWN}.{part}"] = change(plane).contiguous()
    save_file(stored, path)
    with pytest.raises(UserError, match=message):
        open_source(str(checkpoint.folder)).read(f"{DOWN}.weight")


def test_fp8_of_other_blocks_than_config_json_says_is_refused(make: Make) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    checkpoint = make(lambda name, weight: fp8_tensors(name, weight, 128, 128), quantization)
    with pytest.raises(UserError, match=r"weight_scale_inv should be .* \[4, 8\], not torch.float32 \[2, 4\]"):
        open_source(str(checkpoint.folder)).read(f"{DOWN}.weight")
    config = json.loads((checkpoint.folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = 128
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="blocks of the size 128; two numbers"):
        open_source(str(checkpoint.folder))


def test_a_code_beyond_its_table_is_refused(make: Make) -> None:
    checkpoint = make(lambda name, weight: leanquant_tensors(name, weight, 2, torch.float16), None)
    path = checkpoint.folder / "model.safetensors"
    stored = load_file(path)
    stored[f"{DOWN}.weight_codes"][3, 5] = 0x40
    save_file(stored, path)
    with pytest.raises(UserError, match="holds the code 4, and a table 4 values"):
        open_source(str(checkpoint.folder)).read(f"{DOWN}.weight")


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_names_and_shapes_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """Experts, which such a checkpoint has one by one under other names, and linears that GPT-2 stores transposed,
    which GPTQ does not."""
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, **sizes))
    else:
        model = MixtralForCausalLM(MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                                 num_attention_heads=2, num_local_experts=2, **sizes))  # fmt: skip
    model.half().save_pretrained(tmp_path)
    float_source = open_source(str(tmp_path))
    originals = {name: float_source.read(name).float() for name in float_source.names()}
    linear = re.compile(r"(proj|\.w[123]|c_attn|c_fc)\.weight$")
    stored: Tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if not linear.search(name):
            stored[name] = tensor
            continue
        weight = (tensor.T if kind == "gpt2" else tensor).float().numpy()
        stored |= gptq_tensors(name.removesuffix(".weight"), coded(weight, 8, 32, True))
    save_file({name: part.contiguous() for name, part in stored.items()}, tmp_path / "model.safetensors")
    method = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(method))
    source = open_source(str(tmp_path))
    assert set(source.names()) == set(originals)
    for name, original in originals.items():
        assert source.shape(name) == original.shape
        assert torch.allclose(source.read(name).float(), original, atol=1e-3), name
    planned = plan_recipe(source, Recipe(str(tmp_path), "gguf:Q8_0"))
    assert sum(tensor.source_grid == "kept" for tensor in planned) == {"mixtral": 10, "gpt2": 4}[kind]
    # K-quants are no answer where 256 does not divide the columns.
    too_few = plan_recipe(source, Recipe(str(tmp_path), "gguf:Q4_0"))
    advised = [tensor for tensor in too_few if (tensor.source_grid or "").endswith("; gguf:Q8_0 would hold it")]
    assert len(advised) == {"mixtral": 10, "gpt2": 4}[kind]
