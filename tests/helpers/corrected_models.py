"""Artifacts with low-rank corrections: of real runs, and with random factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lqexport.calibration.texts import read_text
from lqexport.converters.factors import factor_names
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def options(tiny_model: Path, text: Path) -> dict[str, Any]:
    """Recipe options of a short GPTQ run at 2 bits."""
    return {"source": str(tiny_model), "target": "gguf:Q2_K", "calibration": str(text), "samples": 4,
            "sequence_length": 64, "method": "gptq", "moments": "normalized"}  # fmt: skip


@pytest.fixture(scope="module")
def corrected(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A run of `options` with corrections of rank 16."""
    folder = tmp_path_factory.mktemp("corrected") / "out"
    quantize(Recipe(**options, rank=16), folder)
    return Artifact(folder)


def handmade(model: Path, folder: Path, size: float, codec_name: str = "gguf:F32") -> Artifact:
    """Writes the model in float32, with random low-rank factors of various ranks beside all linears but one (Q).

    `size` is the standard deviation of the factors, which are stored by the codec `codec_name`.
    """
    source, artifact, draw = open_source(str(model)), Artifact(folder), torch.Generator().manual_seed(4)
    artifact.begin({"recipe": {"target": "gguf:F32"}})
    source.copy_model_files(artifact.model_folder)
    written = []
    for number, name in enumerate(source.names()):
        weight = source.read(name).float()
        parts = [(name, weight, "gguf:F32")]
        if "proj" in name and name != Q:
            rank = 32 * (1 + number % 3)
            for factor, shape in zip(factor_names(name), ((rank, weight.shape[1]), (len(weight), rank)), strict=True):
                parts.append((factor, size * torch.randn(shape, generator=draw), codec_name))
        for part in parts:
            artifact.write(round_tensor(*part))
            written.append(part[0])
    artifact.finish(written, {"tensors": []})
    return artifact


@pytest.fixture(scope="module")
def by_hand(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model with random low-rank factors in float32."""
    return handmade(tiny_model, tmp_path_factory.mktemp("hand") / "artifact", 0.05)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with 20,000 characters of the held-out text."""
    path = tmp_path_factory.mktemp("heldout") / "text.txt"
    path.write_text(read_text("python-heldout").content[:20_000], encoding="utf-8")
    return str(path)
