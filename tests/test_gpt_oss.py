"""gpt-oss as OpenAI publishes it: experts in MXFP4, which move to GGUF's type of that name, or are solved again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_layouts import fp4_packed, same_bits
from family_cases import make_model, make_tokenizer
from family_cases import texts as texts
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lqexport.converters.gguf import writer as gguf_writer
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 60))]


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns blocks uint8 [experts, rows, columns / 32, 16] and scales uint8 [experts, rows, columns / 32].

    weight   [experts, columns, rows]
    """
    rows = np.ascontiguousarray(weight.detach().transpose(1, 2))
    largest = np.abs(rows.reshape(*rows.shape[:2], -1, 32)).max(3)
    exponents = np.floor(np.log2(largest)).astype(np.int32) - 2
    scale = np.exp2(exponents).astype(np.float32)
    codes, _ = fp4_packed(rows.reshape(-1, rows.shape[2]), scale.reshape(-1, scale.shape[2]))
    return codes.reshape(*scale.shape, 16), torch.from_numpy((exponents + 127).astype(np.uint8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GptOssForCausalLM]:
    """A folder with a small gpt-oss in MXFP4, and the model that transformers decodes from it."""
    folder, decoded = tmp_path_factory.mktemp("gpt-oss"), make_model("gpt-oss")
    decoded.save_pretrained(folder)
    make_tokenizer("gpt-2", folder).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = packed(state.pop(name))
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        decoded.get_parameter(name).data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder, decoded


def expert(model: GptOssForCausalLM, name: str) -> NDArray[np.float32]:
    """Returns the weight [rows, columns] of a linear of block 1's expert 2 in transformers' model."""
    experts = model.model.layers[1].mlp.experts
    gate_up = experts.gate_up_proj[2].T
    weight = {"gate_proj": gate_up[::2], "up_proj": gate_up[1::2], "down_proj": experts.down_proj[2].T}[name]
    return weight.detach().numpy()


def test_source_reads_what_transformers_decodes(model: tuple[Path, GptOssForCausalLM]) -> None:
    folder, decoded = model
    source = open_source(str(folder))
    for linear in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.2.{linear}.weight"
        expected = expert(decoded, linear)
        assert source.shape(name) == expected.shape
        assert same_bits(source.read(name).numpy(), expected)
        assert source.dtype(name) == "mxfp4:g32"
        assert source.nbytes(name) == expected.size * 17 / 32
        blocks, scales = source.file_spans(name)
        assert blocks.nbytes + scales.nbytes == source.nbytes(name) * (1 if linear == "down_proj" else 2)
    assert source.read("model.layers.1.mlp.experts.2.up_proj.bias").shape == (96,)


@pytest.mark.llamacpp
@pytest.mark.parametrize("target", ["gguf:MXFP4_MOE", "gguf:Q5_0"])
def test_experts_move(target: str, model: tuple[Path, GptOssForCausalLM], tmp_path: Path) -> None:
    """Q5_0 holds the same values: its integers include twice the numbers of 4 bits."""
    folder, decoded = model
    report = quantize(Recipe(str(folder), target, method="rtn"), tmp_path / "out")
    grids = {tensor.get("source_grid") for tensor in report["tensors"] if ".experts." in tensor["name"]}
    assert grids == {"kept", None}  # None for biases
    gguf_writer.write(Artifact(tmp_path / "out"), tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for linear, name in {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}.items():
        tensor = stored[f"blk.1.{name}.weight"]
        assert tensor.tensor_type.name == ("MXFP4" if target.endswith("MOE") else "Q5_0")
        assert same_bits(dequantize(np.array(tensor.data[2]), tensor.tensor_type), expert(decoded, linear))
    with LlamaCpp(tmp_path / "model.gguf", 64, threads=1) as engine:
        logits = engine.logits(TOKENS)
    with torch.no_grad():
        expected = decoded(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.98


def test_experts_are_solved_again_where_no_type_holds_them(
    model: tuple[Path, GptOssForCausalLM], texts: tuple[str, str], tmp_path: Path
) -> None:
    options = {"calibration": texts[0], "samples": 2, "sequence_length": 64, "tune": 0, "descent": 1}
    report = quantize(Recipe(str(model[0]), "gguf:Q4_0", **options), tmp_path / "out")
    reasons = {tensor.get("source_grid") for tensor in report["tensors"] if tensor["name"].endswith("up_proj.weight")}
    assert reasons == {"gguf:Q4_0 has no such levels; gguf:MXFP4 would hold it"}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", lambda scales: scales.fill_(255), "exponent 255, with which weights are infinite"),
        ("scales", lambda scales: scales[:, :-2], "should be torch.uint8"),
        ("blocks", lambda blocks: blocks[..., :8], "blocks of 16 bytes"),
        ("blocks", lambda blocks: blocks[:, 1:], "cannot share"),
    ],
)
def test_damaged_experts_are_refused(part: str, change, message: str, model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for path in model[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.experts.gate_up_proj_{part}"
    state[name] = change(state[name]).contiguous()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path)).read("model.layers.0.mlp.experts.2.up_proj.weight")
