"""Writes an artifact as a folder for ExLlamaV3. No value changes.

A linear X [R, C] of K bits is stored as

    X.trellis   int16 [C / 16, R / 16, 16 K]    R and C raised to multiples of 128
    X.suh       float16 [C]                     padded with zeros
    X.svh       float16 [R]                     padded with zeros, so that the padding's outputs are zero
    X.mul1      int32 []                        the codebook

and every other tensor in float16, but biases of routers in float32. The bias of such a linear is padded with zeros,
too.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.exl3.config import exl3_config, for_gptqmodel, quantization, tensor_storage
from lqexport.converters.exl3.plan import PRECISE, padded_weights
from lqexport.converters.exl3.support import check_supported, rules_of
from lqexport.converters.folders.packed import (
    FolderEntry,
    FolderLayout,
    Forms,
    OnTensor,
    check_source_files,
    entries_of,
    write_folder,
)
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import is_linear
from lqexport.converters.plan import PLAIN, UNQUANTIZED
from lqexport.formats.codec import Planes
from lqexport.formats.exl3 import EXL3, MARKERS, WRITTEN_CODEBOOK
from lqexport.formats.trellis import SIDE, padded
from lqexport.storage.artifact import Artifact, StoredTensor

FAMILY = "exl3"
PLAIN_DTYPES: dict[str, np.dtype] = {PLAIN: np.dtype(np.float16), PRECISE: np.dtype(np.float32)}
"""Codec of a tensor that is not in EXL3 -> dtype of its array."""
MARKER = np.array(MARKERS[WRITTEN_CODEBOOK], np.uint32).view(np.int32)


def write(artifact: Artifact, folder: Path, on_tensor: OnTensor = None) -> None:
    """Writes a finished artifact as the new folder `folder` (see `packed.write_folder`).

    Raises UserError if the artifact is unfinished, damaged or not in EXL3, if ExLlamaV3 lacks what the model needs, if
    the folder exists, or if the disk is too small.
    """
    hint = "Quantize again with a target such as exl3:4."
    entries = entries_of(artifact, FAMILY, "an EXL3 folder", hint, tuple(PLAIN_DTYPES))
    config = normalized(artifact.config())
    check_source_files("ExLlamaV3", artifact.model_folder, config)
    architecture = architecture_of(config)
    check_supported(architecture, config)
    trellises = {entry.name for entry in entries if entry.codec_name in EXL3}
    layout = FolderLayout(
        forms=forms,
        planes=planes,
        pieces=functools.partial(rules_of(config).naming.pieces, architecture, config),
        cut=cut,
        plain=PLAIN_DTYPES,
        stored_shape=functools.partial(_stored_shape, trellises),
    )
    write_folder(
        artifact, folder, entries, layout, _configs(artifact, architecture, config, entries, layout), on_tensor
    )


def forms(codec_name: str, shape: tuple[int, ...]) -> Forms:
    """Returns the stored tensors of a run of a matrix's rows: last part of the name -> dtype and shape."""
    rows, columns = (padded(size) for size in shape)
    return EXL3[codec_name].layout(rows, columns) | {WRITTEN_CODEBOOK: (MARKER.dtype, ())}


def planes(tensor: StoredTensor) -> Planes:
    """Returns the arrays that a folder stores for a whole matrix."""
    scales = {name: _filled(tensor.planes[name], padded(len(tensor.planes[name]))) for name in ("suh", "svh")}
    return tensor.planes | scales | {WRITTEN_CODEBOOK: MARKER}


def cut(whole: Planes, rows: tuple[int, int]) -> Planes:
    """Returns the planes of a run of a matrix's rows that begins at a multiple of 128, raised to one at its end."""
    begin, end = rows[0], padded(rows[1])
    return whole | {"trellis": whole["trellis"][:, begin // SIDE : end // SIDE], "svh": whole["svh"][begin:end]}


def _stored_shape(trellises: set[str], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape in which a tensor in float16 is stored."""
    is_bias = f"{name.removesuffix('.bias')}.weight" in trellises
    return (padded(shape[0]),) if is_bias else shape


def _filled(vector: np.ndarray, size: int) -> np.ndarray:
    return np.pad(vector, (0, size - len(vector)))


def _configs(
    artifact: Artifact, architecture: Architecture, config: dict[str, Any], entries: list[FolderEntry],
    layout: FolderLayout,
) -> dict[str, Any]:  # fmt: skip
    """Returns the folder's JSON files."""
    tensors = [entry.folder_tensor(layout, architecture) for entry in entries]
    bits: dict[str, float] = {}
    for entry in entries:
        if entry.codec_name in EXL3:
            pieces = layout.pieces(entry.name, entry.shape[0])
            bits |= dict.fromkeys((name.removesuffix(".weight") for name in pieces), _bits(entry))
    head = next((entry for entry in entries if entry.name == architecture.output), None)
    head_bits = int(_bits(head)) if head and head.codec_name in EXL3 else UNQUANTIZED
    linears = [entry for entry in entries if is_linear(architecture, entry.name) and entry.codec_name in EXL3]
    stated = quantization(artifact.run(), round(average_bits(linears), 4), head_bits)
    storage = tensor_storage(tensors, bits)
    return {
        "config.json": exl3_config(rules_of(config), config, head is not None, stated),
        "quantization_config.json": stated | {"tensor_storage": storage},
        "quantize_config.json": for_gptqmodel(stated, storage),
    }


def _bits(entry: FolderEntry) -> float:
    return EXL3[entry.codec_name].trellis.halves / 2


def average_bits(linears: list[FolderEntry]) -> float:
    """Returns the bits of trellises per weight, with padded matrices, as ExLlamaV3's converter counts."""
    weights = [padded_weights(entry.shape) for entry in linears]
    return sum(_bits(entry) * count for entry, count in zip(linears, weights, strict=True)) / sum(weights)
