"""Lossless and lossy artifacts of the tiny model, and their verification."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lqexport.calibration.texts import read_text
from lqexport.converters.gguf.writer import write
from lqexport.converters.targets import plan
from lqexport.evaluation.evaluate import Evaluation
from lqexport.formats.registry import codec_named
from lqexport.models.source import open_source
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.target import Target
from lqexport.verification.result import Verification
from lqexport.verification.verifying import verify

DOWN = "model.layers.1.mlp.down_proj.weight"


def packed(weights: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Returns the planes of a matrix in the codec `name`, rounded by gguf-py, or by our codec for plain types."""
    codec = codec_named(name)
    if hasattr(codec, "encode_values"):
        return codec.encode_values(weights)
    ((plane, (dtype, shape)),) = codec.layout(*weights.shape).items()
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType[name.removeprefix("gguf:")])
    return {plane: np.ascontiguousarray(blocks).reshape(-1).view(dtype).reshape(shape)}


def make_artifact(model: Path, folder: Path, target: str, run: dict[str, Any] | None = None) -> Artifact:
    """Writes the model rounded to nearest as a finished artifact."""
    source, artifact = open_source(str(model)), Artifact(folder)
    artifact.begin({"recipe": {"target": target}} | (run or {}))
    source.copy_model_files(artifact.model_folder)
    planned = plan(Target.parse(target), source.config, {name: source.shape(name) for name in source.names()})
    for tensor in planned:
        weights = source.read(tensor.name).float().numpy().reshape(tensor.matrix)
        artifact.write(StoredTensor(tensor.name, tensor.codec_name, tensor.shape, packed(weights, tensor.codec_name)))
    entries = [{"name": tensor.name, "relative_error": 0.25} for tensor in planned if tensor.linear]
    artifact.finish([tensor.name for tensor in planned], {"tensors": entries})
    return artifact


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with 20,000 characters of the held-out text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text("python-heldout").content[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def exact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float16 model as a lossless float16 artifact."""
    return make_artifact(tiny_model, tmp_path_factory.mktemp("exact") / "artifact", "gguf:F16")


@pytest.fixture(scope="module")
def lossy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model as a Q4_0 artifact."""
    return make_artifact(tiny_model, tmp_path_factory.mktemp("lossy") / "artifact", "gguf:Q4_0")


@pytest.fixture(scope="module")
def lossy_file(lossy: Artifact) -> Path:
    """The GGUF file of `lossy`."""
    path = lossy.folder.with_name("model.gguf")
    write(lossy, path)
    return path


@pytest.fixture(scope="module")
def found(lossy_file: Path, lossy: Artifact, tiny_model: Path, text: str) -> Verification:
    """The verification of `lossy_file`."""
    return verify(lossy_file, str(tiny_model), text=text, windows=2, artifact=lossy.folder)


def copied(artifact: Artifact, folder: Path) -> Artifact:
    """Copies an artifact to `folder`."""
    shutil.copytree(artifact.folder, folder)
    return Artifact(folder)


def not_finite(evaluation: Evaluation) -> Evaluation:
    """Returns the evaluation with numbers that are not finite."""
    return dataclasses.replace(evaluation, kl=math.nan, perplexity=math.inf, ln_ratio=math.inf, kl_by_window=[math.nan])
