"""Checkpoints of small floating-point numbers as sources: FP8, NVFP4, MXFP4, and bitsandbytes' tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_layouts import DOWN, Made, Make, Tensors, coded, fp4_packed, same_bits
from checkpoint_layouts import make as make
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lqexport.converters.gguf.scales import WITH_SCALE
from lqexport.errors import UserError
from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe

NF4 = np.array([-1, -0.7, -0.53, -0.4, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1], np.float32)
"""A table like bitsandbytes' for NF4; the reader takes the one that the checkpoint has."""


def check(make: Make, tensors_of: Callable[[str, NDArray[np.float32]], Made], quantization: dict[str, Any]) -> Path:
    """Asserts that the source of a written checkpoint has the right names, shapes and values; returns the folder."""
    checkpoint = make(tensors_of, quantization)
    source = open_source(str(checkpoint.folder))
    assert set(source.names()) == checkpoint.values.keys()
    for name, values in checkpoint.values.items():
        assert source.shape(name) == values.shape
        assert same_bits(source.read(name).float().numpy(), values), name
        assert source.dtype(name)
        assert source.nbytes(name) > 0
    return checkpoint.folder


def fp8(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Returns the weights divided by the scale in float8, and the values that these stand for."""
    codes = torch.from_numpy(weight / scale).to(torch.float8_e4m3fn)
    return codes, codes.float().numpy() * scale


@pytest.mark.parametrize(
    ("quantization", "part", "by_row"),
    [
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_scale_inv", False),
        ({"quant_method": "fp8"}, "weight_scale", False),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", True),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", False),
    ],
)
def test_fp8_of_one_scale_for_a_matrix_or_for_each_row(
    quantization: dict[str, Any], part: str, by_row: bool, make: Make
) -> None:
    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        largest = np.abs(weight).max(1, keepdims=True) if by_row else np.abs(weight).max(keepdims=True)
        codes, values = fp8(weight, largest / np.float32(448))
        scale = torch.from_numpy(largest / np.float32(448))
        stored = {"weight": codes, part: scale if by_row else scale.reshape(()), "input_scale": torch.tensor(1.0)}
        return {f"{name}.{end}": tensor for end, tensor in stored.items()}, values

    check(make, tensors_of, quantization)


def nvfp4_tensors(name: str, weight: NDArray[np.float32]) -> Made:
    """Returns a linear as ModelOpt stores it."""
    largest = np.abs(weight.reshape(len(weight), -1, 16)).max(2) / 6
    whole = np.float32(largest.max() / 448)
    scale = torch.from_numpy(largest / whole).to(torch.float8_e4m3fn)
    packed, products = fp4_packed(weight / whole, scale.float().numpy())
    stored = {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(whole)}
    return {f"{name}.{part}": tensor for part, tensor in stored.items()}, products * whole


def test_nvfp4_of_modelopt(make: Make, tmp_path: Path) -> None:
    """Its scale for the matrix moves to a tensor of the GGUF file."""
    folder = check(make, nvfp4_tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    check_moves(folder, "gguf:NVFP4", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    assert open_source(str(folder)).shape(f"{DOWN}.weight") == (256, 512)


@pytest.mark.parametrize(
    ("form", "group", "moves"), [("nvfp4-pack-quantized", 16, "NVFP4"), ("mxfp4-pack-quantized", 32, "MXFP4")]
)
def test_fp4_of_compressed_tensors_reads_as_its_library_does(
    form: str, group: int, moves: str, make: Make, tmp_path: Path
) -> None:
    """The library decodes to bfloat16. Both move to GGUF's types."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": group, "dynamic": False}
    weights |= {"strategy": "tensor_group" if group == 16 else "group"}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(form)

    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        largest = np.abs(weight.reshape(len(weight), -1, group)).max(2) / 6
        given = {"weight": torch.from_numpy(weight)}
        if group == 16:
            given["weight_global_scale"] = torch.tensor([448 / largest.max()])
            scale = torch.from_numpy(largest) * given["weight_global_scale"]
            scale = scale.to(torch.float8_e4m3fn).float()
            whole = (1 / given["weight_global_scale"]).numpy()
        else:
            scale = torch.from_numpy(np.exp2(np.ceil(np.log2(largest))).astype(np.float32))
            whole = np.ones(1, np.float32)
        parts = compressor.compress(given | {"weight_scale": scale}, scheme)
        numbers = unpack_fp4_from_uint8(parts["weight_packed"], *weight.shape, torch.float32).numpy()
        values = np.repeat(scale.numpy(), group, 1) * numbers * whole
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}, values

    groups = {"group_0": {"format": form, "targets": ["Linear"]}}
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    folder = check(make, tensors_of, quantization)
    stored = load_file(folder / "model.safetensors")
    parts = {key.removeprefix(f"{DOWN}."): tensor for key, tensor in stored.items() if key.startswith(f"{DOWN}.")}
    theirs, ours = compressor.decompress(parts, scheme)["weight"], open_source(str(folder)).read(f"{DOWN}.weight")
    assert torch.allclose(ours, theirs.float(), rtol=2**-7, atol=0)
    check_moves(folder, f"gguf:{moves}", tmp_path / "out")


def test_a_scheme_for_each_group_of_modules(make: Make) -> None:
    """compressed-tensors: 4 bits in groups, float8 with a scale for each row, and linears left as they are."""
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)

    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        if "v_proj" in name:
            return {f"{name}.weight": torch.from_numpy(weight)}, weight
        if "down_proj" in name:
            scale = np.abs(weight).max(1, keepdims=True) / np.float32(448)
            codes, values = fp8(weight, scale)
            return {f"{name}.weight": codes, f"{name}.weight_scale": torch.from_numpy(scale)}, values
        linear = coded(weight, 4, 128, True)
        given = {"weight": torch.from_numpy(weight), "weight_scale": torch.from_numpy(linear.scale).float()}
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        parts = compressor.compress(given, scheme)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}, compressor.decompress(parts, scheme)[
            "weight"
        ].numpy()

    groups = {
        "group_0": {"format": "pack-quantized", "targets": ["re:.*(q|k|o|gate|up)_proj$"], "weights": weights},
        "group_1": {"format": "float-quantized", "targets": ["re:.*down_proj$"]},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    folder = check(make, tensors_of, quantization | {"ignore": ["re:.*v_proj$", "lm_head"]})
    source = open_source(str(folder))
    names = [f"model.layers.0.{module}.weight" for module in ("self_attn.q_proj", "mlp.down_proj", "self_attn.v_proj")]
    assert [source.dtype(name) for name in names] == ["pack-quantized:4-g128-sym", "float-quantized:8-row-sym", "F32"]


def check_moves(folder: Path, target: str, out: Path) -> None:
    """Asserts that all linears of a source move to a target without calibration, and decode to the same values."""
    report = quantize(Recipe(str(folder), target), out)
    kept = [tensor for tensor in report["tensors"] if "proj" in tensor["name"]]
    assert all(tensor["source_grid"] == "kept" for tensor in kept)
    assert {tensor["codec"] for tensor in kept} == {WITH_SCALE.get(target, target)}
    source, written = open_source(str(folder)), open_export(out)
    assert all(same_bits(written.read(name).numpy(), source.read(name).float().numpy()) for name in written.names())


def bnb_tensors(name: str, weight: NDArray[np.float32], *, nested: bool, kind: str = "nf4") -> Made:
    """Returns a linear as bitsandbytes stores it in 4 bits, in blocks of 64 weights."""
    flat = weight.reshape(-1, 64)
    factors = np.abs(flat).max(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    stored: Tensors = {"weight.quant_map": torch.from_numpy(NF4.copy())}
    if nested:
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        offset = float(factors.mean())
        outer = np.abs((factors - np.float32(offset)).reshape(-1, 256)).max(1)
        codes = np.abs(((factors - np.float32(offset)) / np.repeat(outer, 256))[:, None] - table).argmin(1)
        factors = table[codes] * np.repeat(outer, 256) + np.float32(offset)
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        stored |= {"weight.absmax": torch.from_numpy(codes.astype(np.uint8))}
        stored |= {"weight.nested_absmax": torch.from_numpy(outer), "weight.nested_quant_map": torch.from_numpy(table)}
    else:
        stored["weight.absmax"] = torch.from_numpy(factors)
    codes = np.abs((flat / factors[:, None])[..., None] - NF4).argmin(-1).astype(np.uint8).reshape(-1)
    stored["weight"] = torch.from_numpy(codes[0::2] << 4 | codes[1::2])[:, None]
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = text
    values = (NF4[codes].reshape(-1, 64) * factors[:, None]).reshape(weight.shape)
    return {f"{name}.{part}": tensor for part, tensor in stored.items()}, values


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_4_bits(nested: bool, make: Make) -> None:
    folder = check(make, lambda *linear: bnb_tensors(*linear, nested=nested), {"quant_method": "bitsandbytes"})
    stored = load_file(folder / "model.safetensors")
    stored[f"{DOWN}.weight.absmax"] = stored[f"{DOWN}.weight.absmax"][:-1].clone()
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match="absmax should hold 2048 numbers"):
        open_source(str(folder)).read(f"{DOWN}.weight")


def test_bitsandbytes_of_8_bits(make: Make) -> None:
    def tensors_of(name: str, weight: NDArray[np.float32]) -> Made:
        largest = np.abs(weight).max(1)
        step = largest / np.float32(127)
        codes = np.rint(weight / step[:, None]).astype(np.int8)
        stored = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(largest)}
        stored["weight_format"] = torch.tensor(0, dtype=torch.uint8)
        return {f"{name}.{part}": tensor for part, tensor in stored.items()}, step[:, None] * codes.astype(np.float32)

    check(make, tensors_of, {"quant_method": "bitsandbytes", "load_in_8bit": True})
