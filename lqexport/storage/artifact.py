"""The artifact: the folder that `quantize` writes and every converter reads.

    OUT/run.json           what identifies the run: recipe, source, calibration, versions. Written first.
    OUT/model/             config.json, tokenizer and other small files of the source; of a .gguf source also
                           source-metadata.gguf, what its metadata says
    OUT/tensors/NAME.safetensors    one finished tensor: its packed planes, and its facts as metadata
    OUT/mixes.json         EXL2 and EXL3: the loss of each linear at each choice of widths
    OUT/budget.json        if a size was asked for: the loss of each tensor at each type, and the types that were chosen
    OUT/report.json        what the solver recorded for each tensor
    OUT/manifest.json      every tensor with its codec, shape and digest, the digest of every file, and a digest of
                           the manifest itself. Written last: an artifact with a manifest is complete.
    OUT/log.jsonl          times and memory; the only file that differs between two runs of the same recipe

A file appears under its final name only when it is complete and synced to disk, so a killed run resumes from the files
that exist.

torch, which takes seconds to import, is imported when values are asked for as its tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from lqexport.errors import AGAIN, ANEW, UserError, listed, well_formed
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec_named
from lqexport.storage.background import BackgroundWorker
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

if TYPE_CHECKING:
    from torch import Tensor

SOURCE_METADATA = "source-metadata.gguf"
"""Name of the file in the model folder that holds the metadata of a .gguf source (`converters.gguf.kept`)."""
UNKNOWN = "was not known to it"
"""What is said of an option of a run that the run in a folder does not have: an older version began that."""
OTHERS = {
    "calibration.sha256": "the calibration text has another content",
    "calibration.tokens_sha256": "the calibration text gives other token ids, as with another tokenizer",
}
"""Digest in run.json -> what is said if it differs."""
NOT_IN_ALL = ("calibration.tokens_sha256",)
"""Parts that run.json did not always have. A run that lacks them is not compared by them."""
LONGEST_NAME = 200
"""The most characters that a tensor's name may have. File systems allow 255 bytes for a file name."""


def digest(planes: Planes) -> str:
    """Returns the sha256 (hex) over the planes' names, dtypes, shapes and bytes, in the order of the names."""
    hasher = hashlib.sha256()
    for name in sorted(planes):
        plane = planes[name]
        hasher.update(f"{name} {plane.dtype.str} {plane.shape}\n".encode())
        hasher.update(np.ascontiguousarray(plane).view(np.uint8).data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as an artifact stores it.

    name         its Hugging Face name
    codec_name   the codec that decodes the planes
    shape        [rows, columns] or [n]
    planes       the packed bytes
    facts        what the solver recorded, such as losses and dampening; JSON values only
    """

    name: str
    codec_name: str
    shape: tuple[int, ...]
    planes: Planes
    facts: dict[str, Any] = field(default_factory=dict)


def decoded(tensor: StoredTensor) -> NDArray[np.float32]:
    """Returns a stored tensor's values, float32 in the tensor's shape.

    Raises UserError if the planes do not fit the codec.
    """
    try:
        return codec_named(tensor.codec_name).decode(tensor.planes, tensor.shape[-1]).reshape(tensor.shape)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{tensor.name} cannot be decoded as {tensor.codec_name}: {error}.") from error


def values_of(tensor: StoredTensor) -> Tensor:
    """Returns the decoded values of a stored matrix as a torch tensor, float32 [rows, columns]."""
    import torch

    return torch.from_numpy(decoded(tensor))


class Artifact:
    """An artifact folder, complete or still being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = BackgroundWorker()

    @property
    def model_folder(self) -> Path:
        """The folder of config.json, the tokenizer and other small files."""
        return self.folder / "model"

    def model_files(self) -> list[Path]:
        """Returns the paths of those files of the model folder that a written folder gets a copy of, sorted."""
        paths = (path for path in self.model_folder.rglob("[!.]*") if path.is_file())
        return sorted(path for path in paths if path.name != SOURCE_METADATA)

    @property
    def complete(self) -> bool:
        """Whether the manifest is written, which is the last step of a run."""
        return (self.folder / "manifest.json").is_file()

    @property
    def begun(self) -> bool:
        """Whether run.json is written, which is the first step of a run."""
        return (self.folder / "run.json").is_file()

    def run(self) -> dict[str, Any]:
        """Returns the content of run.json. Raises UserError if the folder is not an artifact."""
        return self._json("run.json")

    def manifest(self) -> dict[str, dict[str, Any]]:
        """Returns each tensor's entry (codec, shape, sha256) by its name, in model order.

        Raises UserError if the run is not finished, or if the manifest is damaged.
        """
        with well_formed(self.folder / "manifest.json", ANEW):
            return {self._checked_name(entry["name"]): _checked(entry) for entry in self.whole_manifest()["tensors"]}

    def whole_manifest(self) -> dict[str, Any]:
        """Returns the content of manifest.json. Raises UserError as `manifest` does."""
        if self.begun and not self.complete:
            raise UserError(f"{self.folder} is not finished: run the `lqexport quantize` command that began it again.")
        content = self._json("manifest.json")
        if (self.folder / "manifest.json").read_bytes() != manifest_bytes(content):
            raise UserError(
                f"{self.folder}/manifest.json is damaged: its content is not that of its own digest. {ANEW}"
            )
        return content

    def damaged(self, paths: tuple[str, ...] | None = None) -> list[str]:
        """Returns those files of a finished artifact that are missing or no longer have the digest in the manifest.

        paths   the files to check, relative to the folder; None for all

        Raises UserError as `manifest` does.
        """

        def is_whole(name: str, expected: str) -> bool:
            path = inside(self.folder, self.folder / name)
            return path.is_file() and file_digest(path) == expected

        with well_formed(self.folder / "manifest.json", ANEW):
            files = self.whole_manifest()["files"]
            return [name for name in paths or files if not is_whole(name, files[name])]

    def report(self) -> dict[str, Any]:
        """Returns the content of report.json. Raises UserError if the run is not finished."""
        return self._json("report.json")

    def config(self) -> dict[str, Any]:
        """Returns the model's config.json. Raises UserError if it is missing or has values that no model can have."""
        return check_config(self._json("model/config.json"), self.folder / "model/config.json")

    def _json(self, name: str) -> dict[str, Any]:
        is_model = (self.folder / "config.json").is_file()
        advice = " It holds a model: `lqexport export` makes files of it." * is_model
        return read_json(self.folder / name, f"{self.folder} is not an lqexport artifact: it has no {name}.{advice}")

    def _checked_name(self, name: str) -> str:
        if "/" in name or os.sep in name or not name.isprintable() or len(name) > LONGEST_NAME:
            raise UserError(f"{name!r} cannot be the name of a tensor: it names no file in {self.folder}.")
        return name

    def _path(self, name: str) -> Path:
        return self.folder / "tensors" / f"{self._checked_name(name)}.safetensors"

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def write(self, tensor: StoredTensor) -> None:
        """Stores one finished tensor; its file appears complete or not at all. Equal input gives equal bytes.

        Raises UserError if the file cannot be written.
        """
        # All facts are in one metadata key, because safetensors writes several keys in an order that changes from run
        # to run.
        facts = {"codec": tensor.codec_name, "shape": list(tensor.shape), "facts": tensor.facts, "sha256": SEAL}
        contiguous = {name: np.ascontiguousarray(plane) for name, plane in tensor.planes.items()}
        content = safetensors.numpy.save(contiguous, {"lqexport": json.dumps(facts, sort_keys=True)})
        write_sealed(self._path(tensor.name), content)

    def write_behind(self, tensor: StoredTensor) -> None:
        """Stores one finished tensor in the background, after the tensors given before it.

        An error of `write` is raised by the next call, or by `settle`.
        """
        self._writer.start(lambda: self.write(tensor))

    def settle(self) -> None:
        """Waits until every tensor given to `write_behind` is written. Raises the error of the last write."""
        self._writer.wait()

    def remove(self, name: str) -> None:
        """Deletes a stored tensor, if it exists."""
        self._path(name).unlink(missing_ok=True)

    def read(self, name: str) -> StoredTensor:
        """Returns one stored tensor. Raises UserError if its file is missing or damaged."""
        with self._open(name) as (file, header):
            planes = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return StoredTensor(name, header["codec"], tuple(header["shape"]), planes, header["facts"])

    def read_listed(self, name: str, codec: str, shape: tuple[int, ...], sha256: str) -> StoredTensor:
        """Returns a tensor after comparing it with its entry in the manifest.

        Raises UserError if the file is missing or damaged, or if codec, shape or digest are not those of the entry.
        """
        tensor = self.read(name)
        if (tensor.codec_name, tensor.shape, digest(tensor.planes)) != (codec, shape, sha256):
            raise UserError(
                f"Tensor {name} in {self.folder} is not the one that its manifest lists: the artifact is damaged. "
                f"{ANEW}"
            )
        return tensor

    def chosen_types(self) -> dict[str, str]:
        """Returns the codec name of each tensor, as an earlier choice of types by size for this artifact fixed it.

        Empty if no such choice was made. Raises UserError if budget.json is damaged.
        """
        path = self.folder / "budget.json"
        with well_formed(path, AGAIN):
            return dict(read_json(path, "")["chosen"]) if path.is_file() else {}

    def facts(self, name: str) -> dict[str, Any]:
        """Returns the facts of a stored tensor without reading its planes. Raises UserError as `read` does."""
        with self._open(name) as (_, header):
            return dict(header["facts"])

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Opens a tensor's safetensors file; gives it together with its metadata, which is checked."""
        advice = ANEW if self.complete else AGAIN
        with open_tensors(self._path(name), "np", advice) as file:
            yield file, _checked(json.loads(file.metadata()["lqexport"]))

    def finish(self, names: list[str], report: dict[str, Any]) -> None:
        """Writes report.json and then the manifest of the tensors `names`, which completes the artifact."""
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
        """Returns the relative paths of all files of a finished artifact except the manifest and the log.

        Hidden files, such as .DS_Store, are not its own.
        """
        patterns = ("run.json", "report.json", "budget.json", "mixes.json", "model/**/[!.]*")
        paths = [path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()]
        return sorted(path.relative_to(self.folder).as_posix() for path in [*paths, *map(self._path, names)])

    def check_written(self) -> None:
        """Raises UserError if a safetensors file that a stopped run left, and would resume from, is damaged."""
        for path in sorted(self.folder.rglob("[!.]*.safetensors")):
            check_sealed(path)

    def begin(self, run: dict[str, Any]) -> None:
        """Writes run.json into a new folder, or checks that the folder already belongs to the same run.

        Raises UserError if the folder holds another run or anything else.
        """
        if self.begun:
            self._check_differences(_differences(self.run(), run))
            return
        self.check_own()
        write_json(self.folder / "run.json", run)

    def check_same(self, run: dict[str, Any]) -> None:
        """Raises UserError if the folder holds another run, as far as `run` has the parts of run.json."""
        self._check_differences(_differences(_parts_as(self.run(), run), run))

    def _check_differences(self, different: list[str]) -> None:
        if different:
            by_others = any(each.startswith("versions.") or each.endswith(UNKNOWN) for each in different)
            advice = "Go on with the versions that began it, choose" if by_others else "Choose"
            raise UserError(
                f"{self.folder} holds another run: {listed(different, 4)}. "
                f"{advice} another output folder, or delete this one."
            )

    def check_own(self) -> None:
        """Raises UserError if the folder holds anything but an artifact. It may be missing or empty."""
        if self.begun:
            return
        leftovers = {unfinished(self.folder / "run.json")}
        if self.folder.exists() and (not self.folder.is_dir() or set(self.folder.iterdir()) - leftovers):
            raise UserError(f"{self.folder} exists and is not an lqexport artifact. Choose another output folder.")

    def log(self, entry: dict[str, Any]) -> None:
        """Appends one line to log.jsonl. Raises UserError if it cannot be written."""
        path = self.folder / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from error


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns a tensor's entry of the manifest or of its own file. Raises ValueError if its shape is impossible."""
    rows, columns = entry["shape"] if len(entry["shape"]) == 2 else (1, *entry["shape"])
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise ValueError(f"{entry['shape']} is no shape")
    codec_named(entry["codec"]).layout(rows, columns)
    return entry


def _parts_as(run: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns those parts of a run that another one has, two levels deep."""
    parts = {key: run[key] for key in other if key in run}
    return {
        key: {name: part[name] for name in other[key] if name in part}
        if isinstance(part, dict) and isinstance(other[key], dict)
        else part
        for key, part in parts.items()
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns how the run in a folder differs from a new one, by parts of a sentence: `recipe.samples is 64, not 8`."""
    differences = []
    for key in sorted(old.keys() | new.keys(), reverse=True):  # calibration, which follows from the recipe, comes last
        ours, theirs = old.get(key), new.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            compared = ours.keys() | {name for name in theirs if f"{key}.{name}" not in NOT_IN_ALL}
            names = sorted(name for name in compared if ours.get(name) != theirs.get(name))
            differences += [
                OTHERS.get(f"{key}.{name}")
                or f"{key}.{name} {f'is {ours[name]!r}, not {theirs.get(name)!r}' if name in ours else UNKNOWN}"
                for name in names
            ]
        elif ours != theirs:
            differences.append(f"{key} is another one")
    return differences


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Returns the bytes of manifest.json: the manifest, and the sha256 of its other keys under the key `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return json_bytes(rest | {"sha256": hashlib.sha256(json_bytes(rest)).hexdigest()})


class SolvedModel:
    """The tensors that an artifact holds so far, as a model's `Weights` (`lqexport.models.interface`).

    Tensors are read and decoded one at a time.
    """

    def __init__(self, artifact: Artifact, config: dict[str, Any], names: list[str]) -> None:
        self._artifact, self.config, self._names = artifact, config, names

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._artifact.read(name).shape

    def read(self, name: str) -> Tensor:
        return values_of(self._artifact.read(name))
