"""Writes checkpoints of the tiny model in the layouts of other tools, as each layout is described."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Q_PROJ, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
ROW = {"strategy": "channel", "group_size": None}
Tensors = dict[str, torch.Tensor]
MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
E2M1 = np.array([*MAGNITUDES, *(-number for number in MAGNITUDES)], np.float32)
"""The value of each code of a floating-point number of 4 bits."""


@dataclass(frozen=True)
class Coded:
    """A linear quantized to integers.

    codes      integers [R, C]
    zero       zero points [R, G]
    scale      scales, float16 [R, G]
    group_of   group of each column [C]
    """

    bits: int
    codes: NDArray[np.int64]
    zero: NDArray[np.int64]
    scale: NDArray[np.float16]
    group_of: NDArray[np.int64]

    @property
    def values(self) -> NDArray[np.float32]:
        """The weights [R, C] that the integers stand for."""
        integers = (self.codes - self.zero[:, self.group_of]).astype(np.float32)
        return self.scale.astype(np.float32)[:, self.group_of] * integers


def coded(weight: NDArray[np.float32], bits: int, group: int, symmetric: bool, act_order: bool = False) -> Coded:
    """Returns the weights [R, C] rounded to nearest, in groups of `group` columns; 0 makes one group of all columns.

    With `act_order` columns belong to the groups in a random order.
    """
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
    """Returns each row of integers as a stream of bits, the lowest bit first, in words of 32 bits."""
    stream = (integers[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(len(integers), -1).astype(np.uint8), axis=1, bitorder="little").view("<i4")


def gptq_tensors(name: str, linear: Coded, less: int = 1) -> Tensors:
    """Returns a linear's tensors in GPTQ's layout, with zero points stored as the zero minus `less`."""
    stored = {
        "qweight": words(linear.codes, linear.bits).T,
        "qzeros": words(linear.zero.T - less, linear.bits),
        "scales": linear.scale.T,
        "g_idx": linear.group_of.astype(np.int32),
    }
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in stored.items()}


def awq_tensors(name: str, linear: Coded) -> Tensors:
    """Returns a linear's tensors in AWQ's layout (4 bits)."""

    def interleaved(lines: NDArray[np.int64]) -> NDArray[np.int32]:
        eights = lines.reshape(len(lines), -1, 8)
        return words(eights[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(lines.shape), 4)

    stored = {"qweight": interleaved(linear.codes.T), "qzeros": interleaved(linear.zero.T), "scales": linear.scale.T}
    return {f"{name}.{part}": torch.from_numpy(np.ascontiguousarray(array)) for part, array in stored.items()}


def leanquant_tensors(name: str, weight: NDArray[np.float32], bits: int, dtype: torch.dtype) -> tuple[Tensors, Any]:
    """Returns a linear's tensors in LeanQuant's layout, and the values that LeanQuant's loader makes of them."""
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
    """A written folder, and the values that every tensor should decode to."""

    folder: Path
    values: dict[str, NDArray[np.float32]]


Made = tuple[Tensors, NDArray[np.float32]]
"""The stored tensors of a linear, and the values that they should decode to."""
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """Writes the tiny model with its linears stored by a function, and a quantization_config in config.json."""

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
    """Writes the tiny model in GPTQ's layout."""

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
    """Writes the tiny model in AWQ's layout."""

    def made(powers: bool = False) -> Checkpoint:
        def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
            linear = coded(weight, 4, 128, False)
            if powers:  # zero points that are powers of two
                linear.zero[:] = np.array([1, 2, 4, 8])[np.arange(linear.zero.size) % 4].reshape(linear.zero.shape)
            return awq_tensors(name, linear), linear.values

        return make(tensors_of, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"})

    return made


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Returns whether two arrays have the same bits, with -0 equal to 0."""
    return np.array_equal((a + 0.0).view(np.uint32), (b + np.float32(0)).view(np.uint32))


def fp8_tensors(name: str, weight: NDArray[np.float32], high: int, wide: int) -> Made:
    """Returns a linear in float8, one scale per block of `high` x `wide` weights, and the values that it stands for."""
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


def fp4_packed(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Returns weights [R, C] in 4 bits, two in a byte with the even column's low, and the values that they stand for.

    scale   [R, G], of each group of columns
    """
    by_column = np.repeat(scale, weight.shape[1] // scale.shape[1], 1)
    codes = np.abs((weight / by_column)[..., None] - E2M1).argmin(-1).astype(np.uint8)
    codes[(codes == 0) & (weight < 0)] = 8  # the negative zero
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), by_column * E2M1[codes]
