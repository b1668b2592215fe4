"""Reads what the files of sentence-transformers beside an encoder say of how its hidden states become an embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lqexport.converters.models.architecture import FIRST, MEAN, Architecture
from lqexport.errors import UserError, well_formed
from lqexport.storage.files import read_json

MODULES, POOLING = "modules.json", "1_Pooling/config.json"
PROJECTION = "linear.weight"
"""The name of a projection's matrix in its own file."""
WITHOUT_WEIGHTS = ("Transformer", "Pooling", "Normalize")
"""The types of modules that hold nothing beside the model, by the last part of their names."""


def pooling_type(folder: Path) -> int:
    """Returns how an encoder's hidden states become an embedding: MEAN or FIRST, by sentence-transformers' config.

    MEAN if there is no such file. Raises UserError for any other pooling.
    """
    path = folder / POOLING
    modes = read_json(path, f"{path} is gone.") if path.is_file() else {"pooling_mode_mean_tokens": True}
    chosen = [
        mode.removeprefix("pooling_mode_") for mode, is_on in modes.items() if "pooling_mode_" in mode and is_on is True
    ]
    known = {"mean_tokens": MEAN, "cls_token": FIRST}
    if len(chosen) != 1 or chosen[0] not in known:
        raise UserError(f"{path} asks for pooling by {chosen}; known are {', '.join(known)}, one of them alone.")
    return known[chosen[0]]


def projection_files(folder: Path, architecture: Architecture) -> dict[str, Path]:
    """Returns the file of each of the architecture's `projections` that the folder has, by the projection's name.

    Raises UserError if the folder multiplies its embeddings otherwise, or does something else with them.
    """
    path = folder / MODULES
    if not path.is_file():
        return {}
    with well_formed(str(path)):
        modules = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in _listed(path)]
    strange = [name for name, _ in modules if name not in (*WITHOUT_WEIGHTS, "Dense")]
    folders = [folder / place for name, place in modules if name == "Dense"]
    if strange or len(folders) not in (0, len(architecture.projections)):
        wanted = f"{len(architecture.projections)} modules Dense or none" if architecture.projections else "no others"
        raise UserError(
            f"{path} lists {', '.join(strange) or f'{len(folders)} modules Dense'} for the embeddings. Known for "
            f"{architecture.classes[0]} are {', '.join(WITHOUT_WEIGHTS)}, and {wanted}."
        )
    for each in folders:
        _check_projection(each)
    return dict(zip(architecture.projections, (each / "model.safetensors" for each in folders), strict=False))


def _listed(path: Path) -> list[dict[str, Any]]:
    modules = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(modules, list):
        raise UserError(f"{path} is damaged: it should hold a JSON list.")
    return modules


def _check_projection(folder: Path) -> None:
    """Raises UserError if a module Dense does more than to multiply by a matrix, or has no file of it."""
    settings = read_json(folder / "config.json", f"{folder} has no config.json. Is the download complete?")
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation != "Identity" or settings.get("bias", True):
        raise UserError(
            f"{folder / 'config.json'} has the activation {activation} and bias {settings.get('bias', True)}, and "
            "llama.cpp multiplies embeddings by matrices alone: Identity and no bias."
        )
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} has no model.safetensors. Is the download complete?")
