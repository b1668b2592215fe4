"""Writes an artifact as a folder of the native format, which transformers loads once lqexport is imported.

    config.json               the source's, with quantization_config: codec, shape and rank of every packed linear
    model.safetensors         or shards with an index
    tokenizer and other small files of the source
    lqexport/                 run.json, report.json and manifest.json of the artifact: recipe, versions, digests

A packed linear X [R, C] is stored as

    X.weight                  uint8 [n]: the plane `codes` [R, bytes of a row], flattened
    X.table, X.scale ...      the codec's other planes, as `formats` has them
    X.low_rank_A [k, C], X.low_rank_B [R, k]   float16 or float32, for a corrected linear; B A is added to the weight
    X.bias                    float32, only where the linear has a bias

Every other tensor is stored under its own name, in float16 or float32.

Without lqexport, loading such a folder must fail. transformers only warns of an unknown quant_method and gives random
weights to missing tensors, but it raises an error for a tensor of a wrong shape. So the codes have the name of the
weight and one dimension, which no linear's weight has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.factors import factor_names, is_factor
from lqexport.converters.folders.folder_model import method_of
from lqexport.converters.folders.shards import FolderTensor, new_folder, write_shards
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import checkpoint_shape
from lqexport.errors import UserError
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact, decoded, manifest_bytes
from lqexport.storage.files import copy_files, file_digest, write_json, written_whole
from lqexport.storage.published import public_run

METHOD, VERSION = "lqexport", 1
RECORD = "lqexport"
"""The sub-folder with the files that describe the run."""
PLAIN_DTYPES: dict[str, np.dtype] = {"gguf:F16": np.dtype(np.float16), "gguf:F32": np.dtype(np.float32)}
"""Codec of a tensor that is not packed -> dtype of its array."""
LOW_RANK = {"A": ".low_rank_A", "B": ".low_rank_B"}


def stored_names(codec_name: str, module: str) -> dict[str, str]:
    """Returns plane -> name in the file for a linear that is packed in a codec."""
    planes = codec_named(codec_name).layout(1, codec_named(codec_name).block)  # every shape has the same planes
    return {plane: f"{module}.{'weight' if plane == 'codes' else plane}" for plane in planes}


def write(artifact: Artifact, folder: Path, on_tensor: Callable[[str, int], None] | None = None) -> None:
    """Writes a finished artifact of a native target as the new folder `folder`. Equal artifacts give equal bytes.

    on_tensor   called with name and bytes after each tensor

    Raises UserError if the artifact is unfinished or damaged, if transformers could not run its tensors, if the folder
    exists, or if the disk is too small.
    """
    manifest, config = artifact.manifest(), artifact.config()
    architecture = architecture_of(config)
    embedding = architecture.embedding
    if architecture.experts or architecture.transposed or architecture.in_parts:
        raise UserError(
            f"transformers keeps the linears of {architecture.classes[0]} in another form (experts in one tensor, "
            "transposed, or several as one), so it cannot load a native folder of them. The artifact itself can "
            "be verified."
        )
    if is_packed(manifest[embedding]):
        raise UserError(f"{embedding} is packed, which transformers cannot run. Quantize again with it in F16.")
    tensors = [_folder_tensor(architecture, name, entry, manifest) for name, entry in manifest.items()]
    config["quantization_config"] = _quantization(manifest)

    def read(tensor: FolderTensor) -> list[np.ndarray]:
        return _arrays(artifact, tensor, manifest[tensor.name])

    with new_folder(folder, sum(tensor.nbytes for tensor in tensors)) as partial:
        copy_files(artifact.model_folder, artifact.model_files(), partial)
        _write_record(artifact, partial / RECORD)
        write_shards(partial, tensors, read, on_tensor)
        write_json(partial / "config.json", config)


def _write_record(artifact: Artifact, folder: Path) -> None:
    """Writes the artifact's run, report and manifest into `folder`, without paths of this machine."""
    report, manifest = artifact.report(), artifact.whole_manifest()
    write_json(folder / "run.json", public_run(artifact.run()))
    write_json(folder / "report.json", report | ({"run": public_run(report["run"])} if "run" in report else {}))
    files = manifest["files"] | {name: file_digest(folder / name) for name in ("run.json", "report.json")}
    with written_whole(folder / "manifest.json") as file:
        file.write(manifest_bytes(manifest | {"files": files}))


def is_packed(entry: dict[str, Any]) -> bool:
    """Returns whether a tensor of a manifest is in a native codec, which the folder stores packed."""
    return str(entry["codec"]).startswith("native:")


def _quantization(manifest: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns quantization_config of config.json. Raises UserError if no linear is packed."""
    modules: dict[str, dict[str, Any]] = {}
    for name, entry in manifest.items():
        if is_packed(entry) and not is_factor(name):
            down, _ = factor_names(name)
            rank = {"rank": manifest[down]["shape"][0]} if down in manifest else {}
            modules[name.removesuffix(".weight")] = {"codec": entry["codec"], "shape": entry["shape"]} | rank
    if not modules:
        raise UserError(
            "No linear of the artifact is in a native codec. Quantize again with a target such as native:table-3; GGUF "
            "and EXL2 artifacts have `to-gguf` and `to-exl2`."
        )
    dtypes = {_factor_dtype(entry["codec"]).name for name, entry in manifest.items() if is_factor(name)}
    dtype = max(dtypes) if dtypes else None
    return {"quant_method": METHOD, "version": VERSION, "modules": modules, "low_rank_dtype": dtype}


def _factor_dtype(codec_name: str) -> np.dtype:
    """Returns the dtype of a stored low-rank factor: float16 if that holds its values exactly, else float32."""
    return PLAIN_DTYPES.get(codec_name, np.dtype(np.float32))


def _folder_tensor(
    architecture: Architecture, name: str, entry: dict[str, Any], manifest: dict[str, dict[str, Any]]
) -> FolderTensor:
    codec_name, shape = entry["codec"], tuple(entry["shape"])
    if is_factor(name):
        module, side = name.removesuffix(".weight").rsplit(".lora_", 1)
        if not is_packed(manifest[f"{module}.weight"]):
            raise UserError(f"{module} is in {manifest[f'{module}.weight']['codec']}, so its correction has no place.")
        return FolderTensor(name, {module + LOW_RANK[side]: (_factor_dtype(codec_name), shape)})
    if codec_name in PLAIN_DTYPES:
        return FolderTensor(name, {name: (PLAIN_DTYPES[codec_name], checkpoint_shape(architecture, name, shape))})
    if not is_packed(entry) or len(shape) != 2:
        raise UserError(
            f"{name} is in {codec_name}, which a native folder does not hold: linears are in native codecs, the rest "
            "in F16 or F32. Quantize again without a type for it."
        )
    names = stored_names(codec_name, name.removesuffix(".weight"))
    planes = codec_named(codec_name).layout(*shape).items()
    flat = {plane: (dtype, (int(np.prod(form)),) if plane == "codes" else form) for plane, (dtype, form) in planes}
    return FolderTensor(name, {names[plane]: form for plane, form in flat.items()})


def _arrays(artifact: Artifact, folder_tensor: FolderTensor, entry: dict[str, Any]) -> list[np.ndarray]:
    """Returns the arrays that the folder stores for a tensor, after its digest is checked."""
    tensor = artifact.read_listed(folder_tensor.name, entry["codec"], tuple(entry["shape"]), entry["sha256"])
    if is_packed(entry) and not is_factor(folder_tensor.name):
        return [tensor.planes[plane] for plane in codec_named(tensor.codec_name).layout(*tensor.shape)]
    ((dtype, _),) = folder_tensor.stored.values()
    return [decoded(tensor).astype(dtype)]


def is_native_folder(folder: Path) -> bool:
    """Returns whether a folder's config.json says that it holds a model of the native format."""
    return method_of(folder) == METHOD
