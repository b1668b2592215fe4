"""Writes an artifact as a folder for mlx-lm. No value changes.

A quantized matrix X [R, C] of B bits in groups of N is stored as

    X.weight    uint32 [R, C * B / 32]
    X.scales    bfloat16 or float16 [R, C / N]
    X.biases    the same

and every other tensor in the dtype of the model.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lqexport.converters.folders.packed import FolderLayout, OnTensor, entries_of, write_folder
from lqexport.converters.mlx.config import mlx_config
from lqexport.converters.mlx.support import check_supported
from lqexport.converters.mlx.types import FAMILY, PLAIN
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.formats.registry import codec_named, family_of
from lqexport.storage.artifact import Artifact

PLAIN_DTYPES = {PLAIN[False]: np.dtype(np.uint16), PLAIN[True]: np.dtype(np.float16)}
"""Codec of a tensor that is not quantized -> dtype of its array; uint16 stands for bfloat16."""


def write(artifact: Artifact, folder: Path, on_tensor: OnTensor = None) -> None:
    """Writes a finished artifact as the new folder `folder` (see `packed.write_folder`).

    Raises UserError if the artifact is unfinished, damaged or of another target, if mlx-lm does not run the model, if
    the folder exists, or if the disk is too small.
    """
    layout = FolderLayout(
        forms=lambda name, shape: codec_named(name).layout(*shape),
        planes=lambda tensor: tensor.planes,
        plain=PLAIN_DTYPES,
    )
    hint = "Quantize again with a target such as mlx:4-g64."
    entries = entries_of(artifact, FAMILY, "an MLX folder", hint, tuple(PLAIN_DTYPES))
    config = artifact.config()
    check_supported(architecture_of(config), normalized(config))
    modules = {
        entry.name.removesuffix(".weight"): entry.codec_name
        for entry in entries
        if family_of(entry.codec_name) == FAMILY
    }
    write_folder(artifact, folder, entries, layout, {"config.json": mlx_config(config, modules)}, on_tensor)
