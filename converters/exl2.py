"""Writing an artifact as a folder for ExLlamaV2: safetensors shards, config.json and the tokenizer. Only bytes move.

The folder appears under its name whole or not at all. Tensors are read, checked against the manifest's digests and
written one after the other, so memory holds one. No index of shards is written: ExLlamaV2 maps every shard that it
finds, and an index copied from the source would name files that are not there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lqexport.artifact import Artifact, StoredTensor, digest, read_json, write_json, written_whole
from lqexport.converters.architectures import architecture_of
from lqexport.converters.exl2_plan import PLAIN, keeps_order
from lqexport.errors import UserError
from lqexport.formats.exl2 import Exl2, runs_named

SHARD_BYTES = 2**33
"""Most bytes of a shard's tensors, as ExLlamaV2's converter has it."""
DTYPES = {"int32": "I32", "int16": "I16", "float16": "F16"}
Planes = dict[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class _Entry:
    """A tensor of the model and what the folder stores of it: name in the file -> dtype and shape."""

    name: str
    codec: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def stored(self) -> Planes:
        if self.codec == PLAIN:
            return {self.name: (np.dtype(np.float16), self.shape)}
        planes = Exl2(runs_named(self.codec)).layout(*self.shape)
        return {f"{self.name.removesuffix('.weight')}.{plane}": form for plane, form in planes.items()}

    @property
    def nbytes(self) -> int:
        return sum(_size(*form) for form in self.stored.values())


def write(artifact: Artifact, folder: Path, on_tensor: Callable[[str, int], None] | None = None) -> None:
    """Write a finished artifact as the new folder `folder`. Equal artifacts give equal bytes.

    on_tensor   called with name and bytes after each tensor

    Raises UserError where the artifact is unfinished, damaged or not of EXL2, where ExLlamaV2 lacks what the model
    needs, where the folder exists, and where the disk is too small.
    """
    entries = _entries(artifact)
    config = _config(artifact, entries)
    _check_place(folder, sum(entry.nbytes for entry in entries))
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(artifact.model_folder, partial)
        write_json(partial / "config.json", config)
        shards = list(_shards(entries))
        for number, shard in enumerate(shards, 1):
            name = f"output-{number:05}-of-{len(shards):05}" if len(shards) > 1 else "output"
            _write_shard(artifact, shard, partial / f"{name}.safetensors", on_tensor)
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"Cannot write {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _entries(artifact: Artifact) -> list[_Entry]:
    entries = [
        _Entry(name, facts["codec"], tuple(facts["shape"]), facts["sha256"])
        for name, facts in artifact.manifest().items()
    ]
    foreign = [entry for entry in entries if entry.codec != PLAIN and not entry.codec.startswith("exl2:")]
    if foreign or all(entry.codec == PLAIN for entry in entries):
        example = f" (such as {foreign[0].name} in {foreign[0].codec})" if foreign else ""
        raise UserError(
            f"{artifact.folder} cannot become an EXL2 folder by moving bytes: it was not quantized for EXL2{example}. "
            "Quantize again with the target exl2."
        )
    return entries


def _config(artifact: Artifact, entries: list[_Entry]) -> dict[str, Any]:
    """The source's config.json with what ExLlamaV2's converter adds. Raises UserError where ExLlamaV2 cannot load the
    model from the folder."""
    config, run = artifact.config(), artifact.run()
    if len(config.get("architectures") or []) != 1:
        raise UserError("ExLlamaV2 needs a config.json that names exactly one architecture.")
    if not (artifact.model_folder / "tokenizer.json").is_file():
        raise UserError(f"ExLlamaV2 needs a tokenizer.json, and {artifact.model_folder} has none.")
    _check_orders(artifact, config, entries)
    recipe, calibration = run["recipe"], run.get("calibration") or {}
    config["quantization_config"] = {
        "quant_method": "exl2",
        "version": "0.3.2",  # of ExLlamaV2, whose format this is
        "bits": recipe["bits"],
        "head_bits": recipe["head_bits"],
        "calibration": {
            "rows": calibration.get("samples", 0),
            "length": calibration.get("sequence_length", 0),
            "dataset": calibration.get("name", ""),
        },
    }
    return config


def _check_orders(artifact: Artifact, config: dict[str, Any], entries: list[_Entry]) -> None:
    architecture = architecture_of(config)
    for entry in entries:
        if keeps_order(architecture, config, entry.name) and entry.codec != PLAIN:
            inverse = artifact.read(entry.name).planes["q_invperm"]
            if not np.array_equal(inverse, np.arange(len(inverse))):
                raise UserError(
                    f"{entry.name} is stored in another order, and ExLlamaV2 would not reorder the biases of the "
                    "layers before it. Quantize again with --no-act-order."
                )


def _check_place(folder: Path, size: int) -> None:
    """Raises UserError where the folder exists or the disk has no room for `size` bytes of tensors."""
    if folder.exists():
        raise UserError(f"{folder} exists. Choose another folder, or delete this one.")
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    needed, free = size + 2**25, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder} needs {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB free. "
            "Free some space or write to another disk."
        )


def _shards(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    """Runs of tensors of at most SHARD_BYTES, or of one tensor."""
    shard: list[_Entry] = []
    for entry in entries:
        if shard and sum(other.nbytes for other in shard) + entry.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write_shard(
    artifact: Artifact, entries: list[_Entry], path: Path, on_tensor: Callable[[str, int], None] | None
) -> None:
    """A safetensors file: length of the header, header, then the planes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        for name, (dtype, shape) in entry.stored.items():
            stop = start + _size(dtype, shape)
            header[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for plane in _planes(artifact, entry):
                file.write(np.ascontiguousarray(plane).data)
            if on_tensor:
                on_tensor(entry.name, entry.nbytes)


def _planes(artifact: Artifact, entry: _Entry) -> list[np.ndarray]:
    """What the file stores of a tensor, in the order of `stored`, after its digest was checked."""
    tensor: StoredTensor = artifact.read(entry.name)
    if (tensor.codec, tensor.shape, digest(tensor.planes)) != (entry.codec, entry.shape, entry.sha256):
        raise UserError(
            f"Tensor {entry.name} in {artifact.folder} is not the one that its manifest lists: the artifact is "
            "damaged. Delete the tensor's file and run the same quantize command again."
        )
    if entry.codec == PLAIN:
        return [tensor.planes["blocks"].view(np.float16).reshape(entry.shape)]
    return [tensor.planes[name.rpartition(".")[2]] for name in entry.stored]


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def is_exl2_folder(folder: Path) -> bool:
    """Whether a folder's config.json says that it holds an EXL2 model."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    quantization = read_json(path, "").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "exl2"
