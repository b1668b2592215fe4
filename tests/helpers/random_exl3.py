"""Artifacts in EXL3 whose linears are random, so that nothing is solved: any bits are a walk through the trellis."""

from __future__ import annotations

import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lqexport.converters.plan import PlannedTensor
from lqexport.formats.registry import codec_named
from lqexport.models.source import open_source
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact, StoredTensor


def random_linear(tensor: PlannedTensor) -> StoredTensor:
    """Returns a linear with random weights of variance 1 / columns, as the plan has it."""
    draw = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    rows, columns = tensor.matrix
    (_, tiles), *_ = codec_named(tensor.codec_name).layout(rows, columns).values()
    signs = (draw.choice([-1.0, 1.0], size) for size in (columns, rows))
    suh, svh = (each * draw.uniform(0.8, 1.2, len(each)) for each in signs)
    planes = {
        "trellis": draw.integers(-(2**15), 2**15, tiles).astype(np.int16),
        "suh": (suh / columns**0.5).astype(np.float16),
        "svh": svh.astype(np.float16),
    }
    return StoredTensor(tensor.name, tensor.codec_name, tensor.shape, planes)


def random_artifact(recipe: Recipe, folder: Path) -> Artifact:
    """Returns a finished artifact of a recipe's plan with random linears; the other tensors are the source's."""
    source, artifact = open_source(recipe.source), Artifact(folder)
    planned = plan_recipe(source, recipe)
    artifact.begin({"recipe": asdict(recipe), "calibration": None})
    source.copy_model_files(artifact.model_folder)
    for tensor in planned:
        solved = tensor.linear or tensor.codec_name.startswith("exl3:")
        stored = (
            random_linear(tensor) if solved else round_tensor(tensor.name, source.read(tensor.name), tensor.codec_name)
        )
        artifact.write(stored)
    artifact.finish([tensor.name for tensor in planned], {"tensors": []})
    return artifact
