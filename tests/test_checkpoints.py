"""Checkpoints that other tools have quantized, as sources: written here by each layout's description, read, moved or
solved again, and decoded by gguf, libgguf and compressed-tensors."""

from __future__ import annotations

import json
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
from lqexport.formats.codec import PlainCodec
from lqexport.formats.moves import AffineGrid, TableGrid, move
from lqexport.formats.registry import codec, names
from lqexport.inspect import inspect
from lqexport.pipeline import quantize
from lqexport.recipe import Recipe
from lqexport.source import open_source
from lqexport.verification import verify

Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
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
    rows, columns = weight.shape
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
