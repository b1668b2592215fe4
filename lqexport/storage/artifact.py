"""The folder that `quantize` writes and every converter reads.

    OUT/run.json           what makes the run this run: recipe, source, calibration, versions. Written first.
    OUT/model/             config.json, tokenizer and other small files of the source
    OUT/tensors/NAME.safetensors    one finished tensor: its packed planes, and its facts as metadata
    OUT/mixes.json         EXL2: what each mix of widths would cost each linear
    OUT/budget.json        with a size: what each type would cost each tensor, and the types that were chosen
    OUT/report.json        what the solver saw per tensor
    OUT/manifest.json      every tensor with its codec, shape and digest, the digest of every file and its own. Written
                           last: it says the artifact is whole.
    OUT/log.jsonl          times, memory; the one file that differs between two runs of the same recipe

A file appears under its final name only when it is whole and on disk, so a killed run resumes from what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from lqexport.errors import AGAIN, ANEW, UserError, well_formed
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec_named
from lqexport.storage.background import OneBehind
from lqexport.storage.config_check import check_config
from lqexport.storage.files import (
    cannot_write,
    file_digest,
    inside,
    json_bytes,
    read_json,
    unfinished,
    write_json,
    written_whole,
)
from lqexport.storage.tensor_files import SEAL, check_sealed, open_tensors, write_sealed

LONGEST_NAME = 200
"""Characters of a tensor's name; file systems have names of 255 bytes."""


def digest(planes: Planes) -> str:
    """sha256 over the planes' names, dtypes, shapes and bytes, in the order of their names."""
    hasher = hashlib.sha256()
    for name in sorted(planes):
        plane = planes[name]
        hasher.update(f"{name} {plane.dtype.str} {plane.shape}\n".encode())
        hasher.update(np.ascontiguousarray(plane).view(np.uint8).data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as stored: its Hugging Face name, codec name, shape [rows, columns] or [n], planes, and facts
    (losses, dampening: whatever the solver recorded, JSON values only)."""

    name: str
    codec_name: str
    shape: tuple[int, ...]
    planes: Planes
    facts: dict[str, Any] = field(default_factory=dict)


def decoded(tensor: StoredTensor) -> NDArray[np.float32]:
    """A stored tensor's values, float32 in its own shape. Raises UserError where the planes do not fit the codec."""
    try:
        return codec_named(tensor.codec_name).decode(tensor.planes, tensor.shape[-1]).reshape(tensor.shape)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{tensor.name} cannot be decoded as {tensor.codec_name}: {error}.") from error


def values_of(tensor: StoredTensor) -> Tensor:
    """What a stored matrix decodes to, float32 [R, C]."""
    return torch.from_numpy(decoded(tensor))


class Artifact:
    """An artifact folder, complete or in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._behind = OneBehind()

    @property
    def model_folder(self) -> Path:
        """config.json, tokenizer files and the like."""
        return self.folder / "model"

    def model_files(self) -> list[Path]:
        """All files of the model folder."""
        return sorted(path for path in self.model_folder.rglob("*") if path.is_file())

    @property
    def complete(self) -> bool:
        return (self.folder / "manifest.json").is_file()

    def run(self) -> dict[str, Any]:
        """The content of run.json. Raises UserError where the folder is not an artifact."""
        return self._json("run.json")

    def manifest(self) -> dict[str, dict[str, Any]]:
        """Per tensor, in model order: codec, shape, sha256. Raises UserError where the run is not finished."""
        with well_formed(self.folder / "manifest.json", ANEW):
            return {self._checked_name(entry["name"]): _checked(entry) for entry in self._manifest()["tensors"]}

    def _manifest(self) -> dict[str, Any]:
        if not self.complete and (self.folder / "run.json").is_file():
            raise UserError(f"{self.folder} is not finished: run the `lqexport quantize` command that began it again.")
        content = self._json("manifest.json")
        if (self.folder / "manifest.json").read_bytes() != manifest_bytes(content):
            raise UserError(
                f"{self.folder}/manifest.json is damaged: its content is not that of its own digest. {ANEW}"
            )
        return content

    def damaged(self, among: tuple[str, ...] | None = None) -> list[str]:
        """Files of a finished artifact, all or these, that are gone or not as they were written. Raises UserError as
        `manifest`."""

        def is_whole(name: str, expected: str) -> bool:
            path = inside(self.folder, self.folder / name)
            return path.is_file() and file_digest(path) == expected

        with well_formed(self.folder / "manifest.json", ANEW):
            files = self._manifest()["files"]
            return [name for name in among or files if not is_whole(name, files[name])]

    def report(self) -> dict[str, Any]:
        """The content of report.json. Raises UserError where the run is not finished."""
        return self._json("report.json")

    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return check_config(self._json("model/config.json"), self.folder / "model/config.json")

    def _json(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name, f"{self.folder} is not an lqexport artifact: it has no {name}.")

    def _checked_name(self, name: str) -> str:
        if "/" in name or os.sep in name or not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"{name!r} cannot be the name of a tensor: it names no file in {self.folder}.")
        return name

    def _path(self, name: str) -> Path:
        return self.folder / "tensors" / f"{self._checked_name(name)}.safetensors"

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def write(self, tensor: StoredTensor) -> None:
        """Store one finished tensor, whole or not at all. Equal input gives equal bytes."""
        # One metadata key: safetensors writes several in an order that changes from run to run.
        facts = {"codec": tensor.codec_name, "shape": list(tensor.shape), "facts": tensor.facts, "sha256": SEAL}
        contiguous = {name: np.ascontiguousarray(plane) for name, plane in tensor.planes.items()}
        content = safetensors.numpy.save(contiguous, {"lqexport": json.dumps(facts, sort_keys=True)})
        write_sealed(self._path(tensor.name), content)

    def write_behind(self, tensor: StoredTensor) -> None:
        """`write` in the background, after whatever was to be written before. What goes wrong is raised by the next
        call, or by `settle`."""
        self._behind.start(lambda: self.write(tensor))

    def settle(self) -> None:
        """Wait until all is written."""
        self._behind.wait()

    def remove(self, name: str) -> None:
        """Drop a stored tensor; nothing happens where there is none."""
        self._path(name).unlink(missing_ok=True)

    def read(self, name: str) -> StoredTensor:
        """One stored tensor. Raises UserError where the file is missing or damaged."""
        with self._open(name) as (file, header):
            planes = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return StoredTensor(name, header["codec"], tuple(header["shape"]), planes, header["facts"])

    def read_listed(self, name: str, codec: str, shape: tuple[int, ...], sha256: str) -> StoredTensor:
        """A tensor as the manifest lists it. Raises UserError where it is another, or missing or damaged."""
        tensor = self.read(name)
        if (tensor.codec_name, tensor.shape, digest(tensor.planes)) != (codec, shape, sha256):
            raise UserError(
                f"Tensor {name} in {self.folder} is not the one that its manifest lists: the artifact is damaged. "
                f"{ANEW}"
            )
        return tensor

    def chosen_types(self) -> dict[str, str]:
        """Tensor name to codec name, as an earlier choice of types by size for this artifact found them.

        Empty where there was none. Raises UserError where budget.json is damaged.
        """
        path = self.folder / "budget.json"
        with well_formed(path, AGAIN):
            return dict(read_json(path, "")["chosen"]) if path.is_file() else {}

    def facts(self, name: str) -> dict[str, Any]:
        """The facts of a stored tensor alone, without reading its planes. Raises UserError as `read`."""
        with self._open(name) as (_, header):
            return dict(header["facts"])

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A tensor's safetensors file and what its metadata says."""
        advice = ANEW if self.complete else AGAIN
        with open_tensors(self._path(name), "np", advice) as file:
            yield file, _checked(json.loads(file.metadata()["lqexport"]))

    def finish(self, names: list[str], report: dict[str, Any]) -> None:
        """Write the report and then the manifest of all `names`, which says that the artifact is whole."""
        entries = []
        for name in names:
            tensor = self.read(name)
            entry = {
                "name": name,
                "codec": tensor.codec_name,
                "shape": list(tensor.shape),
                "sha256": digest(tensor.planes),
            }
            entries.append(entry)
        write_json(self.folder / "report.json", report)
        files = {path: file_digest(self.folder / path) for path in self._files(names)}
        with written_whole(self.folder / "manifest.json") as file:
            file.write(manifest_bytes({"tensors": entries, "files": files}))

    def _files(self, names: list[str]) -> list[str]:
        """Paths in the folder of what a finished artifact of these tensors holds, besides the manifest and the log."""
        others = ("run.json", "report.json", "budget.json", "mixes.json", "model/**/*")
        paths = [path for pattern in others for path in self.folder.glob(pattern) if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in [*paths, *map(self._path, names)])

    def check_written(self) -> None:
        """Raises UserError where a tensor that a stopped run left, or what it would go on from, has been damaged."""
        for path in sorted(self.folder.rglob("[!.]*.safetensors")):
            check_sealed(path)

    def begin(self, run: dict[str, Any]) -> None:
        """Claim the folder for `run`, or check that it already belongs to the very same run.

        Raises UserError where the folder holds another run or anything else.
        """
        if (self.folder / "run.json").is_file():
            old = self.run()
            different = sorted(key for key in run.keys() | old.keys() if run.get(key) != old.get(key))
            if different:
                raise UserError(
                    f"{self.folder} holds another run (different: {', '.join(different)}). "
                    "Choose another output folder, or delete this one."
                )
            return
        ours = {unfinished(self.folder / "run.json")}
        if self.folder.exists() and (not self.folder.is_dir() or set(self.folder.iterdir()) - ours):
            raise UserError(f"{self.folder} exists and is not an lqexport artifact. Choose another output folder.")
        write_json(self.folder / "run.json", run)

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        path = self.folder / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """What a manifest or a tensor's own file says of it. Raises ValueError where no tensor can be such."""
    rows, columns = entry["shape"] if len(entry["shape"]) == 2 else (1, *entry["shape"])
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise ValueError(f"{entry['shape']} is no shape")
    codec_named(entry["codec"]).layout(rows, columns)
    return entry


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The file of a manifest, with the sha256 of the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return json_bytes(rest | {"sha256": hashlib.sha256(json_bytes(rest)).hexdigest()})


class SolvedModel:
    """The tensors that an artifact holds so far, as a model's weights (see `lqexport.models.interface`), read one at a time."""

    def __init__(self, artifact: Artifact, config: dict[str, Any], names: list[str]) -> None:
        self._artifact, self.config, self._names = artifact, config, names

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._artifact.read(name).shape

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(decoded(self._artifact.read(name)))
