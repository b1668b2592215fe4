"""Unknown quantizations and damaged checkpoints are refused with one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_layouts import DOWN, Make, coded, fp8_tensors, gptq_tensors, leanquant_tensors
from checkpoint_layouts import make as make
from checkpoint_layouts import make_gptq as make_gptq
from safetensors.torch import load_file, save_file

from lqexport.errors import UserError
from lqexport.models.source import open_source


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"quant_method": "quanto"},
            "by quanto, which is not read.* gptq, awq, compressed-tensors, fp8, .*bitsandbytes, mlx, LeanQuant",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version gemv and 4 bits; gemm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "format marlin; gptq and gptq_v2"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format marlin-24; pack"),
        ({"quant_method": "compressed-tensors", "format": "mixed-precision"}, "format mixed-precision; pack"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "mixed-precision",
                "config_groups": {"a": {"format": "pack-quantized"}, "b": {"format": "mxfp6-packed"}},
            },
            "format mxfp6-packed; pack",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "by W4A8_AWQ; NVFP4 and FP8"),
    ],
)
def test_other_quantizations_are_refused(quantization: dict[str, Any], message: str, make: Make) -> None:
    checkpoint = make(lambda name, weight: (gptq_tensors(name, coded(weight, 4, 128, True)), weight), quantization)
    with pytest.raises(UserError, match=message):
        open_source(str(checkpoint.folder))


@pytest.mark.parametrize(
    ("plane_name", "change", "message"),
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
    plane_name: str, change: Callable[[torch.Tensor], torch.Tensor] | None, message: str, make_gptq: Make
) -> None:
    checkpoint = make_gptq(symmetric=True)
    path = checkpoint.folder / "model.safetensors"
    stored = load_file(path)
    plane = stored.pop(f"{DOWN}.{plane_name}")
    if change:
        stored[f"{DOWN}.{plane_name}"] = change(plane).contiguous()
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
