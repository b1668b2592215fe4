"""Writes an artifact as a folder for ExLlamaV2. No value changes.

ExLlamaV2 maps every shard that it finds in the folder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.exl2.config import check_supported, exl2_config
from lqexport.converters.exl2.names import naming
from lqexport.converters.exl2.plan import keeps_order
from lqexport.converters.folders.packed import (
    FolderEntry,
    FolderLayout,
    OnTensor,
    check_source_files,
    entries_of,
    write_folder,
)
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.plan import PLAIN
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact


def write(artifact: Artifact, folder: Path, on_tensor: OnTensor = None) -> None:
    """Writes a finished artifact as the new folder `folder` (see `packed.write_folder`).

    Raises UserError if the artifact is unfinished, damaged or not in EXL2, if ExLlamaV2 lacks what the model needs, if
    the folder exists, or if the disk is too small.
    """
    entries = entries_of(artifact, "exl2", "an EXL2 folder", "Quantize again with the target exl2.")
    config = normalized(artifact.config())
    architecture = architecture_of(config)
    layout = FolderLayout(
        forms=lambda name, shape: codec_named(name).layout(*shape),
        planes=lambda tensor: tensor.planes,
        pieces=functools.partial(naming(architecture).pieces, architecture, config),
        cut=cut,
    )
    write_folder(artifact, folder, entries, layout, {"config.json": _config(artifact, config, entries)}, on_tensor)


def cut(planes: Planes, rows: tuple[int, int]) -> Planes:
    """Returns the planes of a run of a matrix's rows, whose ends are multiples of 32.

    The matrix's rows (outputs) are the last axis of a plane, and a word of q_scale holds eight of them.
    """
    begin, end = rows
    of_rows = {"q_weight": planes["q_weight"][:, begin:end], "q_scale": planes["q_scale"][:, begin // 8 : end // 8]}
    return planes | of_rows


def _config(artifact: Artifact, config: dict[str, Any], entries: list[FolderEntry]) -> dict[str, Any]:
    """Returns the source's config.json with the keys that ExLlamaV2's converter adds.

    Raises UserError if ExLlamaV2 cannot load the model from the folder.
    """
    check_source_files("ExLlamaV2", artifact.model_folder, config)
    architecture, run = architecture_of(config), artifact.run()
    check_supported(architecture, config)
    _check_order(artifact, config, entries)
    config = exl2_config(architecture, config)
    recipe, calibration = run["recipe"], run.get("calibration") or {}
    config["quantization_config"] = {
        "quant_method": "exl2",
        "version": "0.3.2",  # the version of ExLlamaV2 that defines the format
        "bits": recipe["bits"],
        "head_bits": recipe["head_bits"],
        "calibration": {
            "rows": calibration.get("samples", 0),
            "length": calibration.get("sequence_length", 0),
            "dataset": calibration.get("name", ""),
        },
    }
    return config


def _check_order(artifact: Artifact, config: dict[str, Any], entries: list[FolderEntry]) -> None:
    architecture = architecture_of(config)
    for entry in entries:
        if keeps_order(architecture, config, entry.name) and entry.codec_name != PLAIN:
            inverse = artifact.read(entry.name).planes["q_invperm"]
            if not np.array_equal(inverse, np.arange(len(inverse))):
                raise UserError(
                    f"{entry.name} is stored in another order, and ExLlamaV2 would not reorder the biases of the "
                    "layers before it. Quantize again with --no-act-order."
                )
