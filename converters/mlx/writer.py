"""Writes an artifact as a folder for mlx-lm. No value changes.

A quantized matrix X [R, C] of B bits in groups of N is stored as

    X.weight    uint32 [R, C * B / 32]
    X.scales    bfloat16 or float16 [R, C / N], or uint8 in the formats of small floats
    X.biases    as the scales, in the affine formats

and every other tensor in the dtype of the model. The experts of a block share tensors, whose first axis is the expert.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lqexport.converters.folders.packed import FolderEntry, OnTensor, entries_of
from lqexport.converters.folders.shards import FolderTensor, new_folder, write_shards
from lqexport.converters.mlx.config import mlx_config
from lqexport.converters.mlx.names import check_experts, expert_of, stored_name
from lqexport.converters.mlx.support import check_supported
from lqexport.converters.mlx.types import FAMILY, PLAIN
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import checkpoint_shape
from lqexport.formats.registry import codec_named, family_of
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import copy_files, write_json

PLAIN_DTYPES = {PLAIN[False]: np.dtype(np.uint16), PLAIN[True]: np.dtype(np.float16)}
"""Codec of a tensor that is not quantized -> dtype of its array; uint16 stands for bfloat16."""
Stack = list[FolderEntry]
"""The tensors of the model that a folder stores as one: those of all experts of a block, or one."""


def write(artifact: Artifact, folder: Path, on_tensor: OnTensor = None) -> None:
    """Writes a finished artifact as the new folder `folder`. Equal artifacts give equal bytes.

    on_tensor   called with name and bytes after each tensor

    Raises UserError if the artifact is unfinished, damaged or of another target, if mlx-lm does not run the model, if
    experts that share a tensor are in different types, if the folder exists, or if the disk is too small.
    """
    hint = "Quantize again with a target such as mlx:4-g64."
    entries = entries_of(artifact, FAMILY, "an MLX folder", hint, tuple(PLAIN_DTYPES))
    config = artifact.config()
    architecture, model_type = architecture_of(config), str(config.get("model_type"))
    check_supported(architecture, normalized(config))
    check_experts(model_type, {entry.name: entry.codec_name for entry in entries})
    stacks = _stacks(model_type, entries)
    tensors = [_folder_tensor(architecture, model_type, name, stack) for name, stack in stacks.items()]
    modules = {
        name.removesuffix(".weight"): stack[0].codec_name
        for name, stack in stacks.items()
        if family_of(stack[0].codec_name) == FAMILY
    }

    def read(tensor: FolderTensor) -> list[np.ndarray]:
        return _arrays(artifact, tensor, stacks[tensor.name])

    with new_folder(folder, sum(tensor.nbytes for tensor in tensors)) as partial:
        copy_files(artifact.model_folder, artifact.model_files(), partial)
        write_json(partial / "config.json", mlx_config(config, modules))
        write_shards(partial, tensors, read, on_tensor)


def _stacks(model_type: str, entries: list[FolderEntry]) -> dict[str, Stack]:
    """Returns stored name -> the tensors that it holds, experts by their numbers."""
    by_name: dict[str, Stack] = {}
    for entry in entries:
        by_name.setdefault(stored_name(model_type, entry.name), []).append(entry)
    for stack in by_name.values():
        stack.sort(key=lambda entry: expert_of(model_type, entry.name) or 0)
    return by_name


def _folder_tensor(architecture: Architecture, model_type: str, name: str, stack: Stack) -> FolderTensor:
    first = stack[0]
    lead = () if expert_of(model_type, first.name) is None else (len(stack),)
    if first.codec_name in PLAIN_DTYPES:
        shape = checkpoint_shape(architecture, first.name, first.shape)
        return FolderTensor(name, {name: (PLAIN_DTYPES[first.codec_name], (*lead, *shape))})
    key, layout = name.removesuffix(".weight"), codec_named(first.codec_name).layout(*first.shape)
    return FolderTensor(name, {f"{key}.{plane}": (dtype, (*lead, *form)) for plane, (dtype, form) in layout.items()})


def _arrays(artifact: Artifact, tensor: FolderTensor, stack: Stack) -> list[np.ndarray]:
    """Returns the arrays that the folder stores for a stack, after the digests are checked."""
    read = [artifact.read_listed(entry.name, entry.codec_name, entry.shape, entry.sha256) for entry in stack]
    if stack[0].codec_name in PLAIN_DTYPES:
        ((dtype, shape),) = tensor.stored.values()
        return [np.stack([one.planes["blocks"].view(dtype) for one in read]).reshape(shape)]
    return [
        np.stack([one.planes[name.rpartition(".")[2]] for one in read]).reshape(shape)
        for name, (_, shape) in tensor.stored.items()
    ]
