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
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from lqexport.converters.config_check import check_config
from lqexport.errors import MALFORMED, UserError, well_formed
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec

ANEW = "Copy the artifact again, or quantize again into another folder."
"""What helps against damage to a finished artifact, which `quantize` takes as it is."""
AGAIN = "Delete it and run the same command again."
"""What helps against damage to what a stopped run left."""
SEAL = "0" * 64
"""Stands in the metadata of a safetensors file for the sha256 of the file, while that is computed."""
LONGEST_NAME = 200
"""Characters of a tensor's name; file systems have names of 255 bytes."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` whole or not at all: written beside it, synced, then renamed.

    Raises UserError where the disk is full or the place cannot be written, and where another process is writing the
    same file; the half-written file is removed.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", opener=_without_truncating) as file:
            _lock(file.fileno(), temporary)
            try:
                file.truncate()
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _without_truncating(path: str, flags: int) -> int:
    """Opens a file that another process may be writing, and leaves it as it is."""
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def _lock(descriptor: int, path: Path) -> None:
    """Keeps other processes from the open file or folder `path` until it is closed, however this process ends. Raises
    UserError where another one holds it, or has just put it in its place."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another process is writing {path}. Wait for it, or write somewhere else.") from None
    except OSError:
        return  # a file system without locks
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        raise UserError(f"Another process has just written what {path} was for. Run the same command again.")


def _sync_folder(folder: Path) -> None:
    """Puts the names of its files on the disk: a rename may be lost otherwise, and a later one kept."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> UserError:
    """What a user is told of an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"The disk is full: cannot write {path}. Free some space and run the same command again.")
    return UserError(f"Cannot write {path}: {error.strerror or error}.")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """While open, `folder` is this process's alone. It is made where it is missing, and then removed if it stays empty.

    Raises UserError where another process has claimed it, and where it cannot be made.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        os.close(descriptor)


def copy_files(folder: Path, paths: Iterable[Path], to: Path) -> None:
    """Copy files of `folder`, each whole or not at all, to the same places in the folder `to`. Raises UserError for a
    link out of `folder`: what it leads to might be nothing to publish."""
    for path in paths:
        with inside(folder, path).open("rb") as original, written_whole(to / path.relative_to(folder)) as copy:
            shutil.copyfileobj(original, copy)


def check_space(path: Path, size: int) -> None:
    """Raises UserError where the disk of a new file or folder has no room for `size` bytes of tensors and as much
    metadata as any model has."""
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    needed, free = size + 2**25, shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB free. "
            "Free some space or write to another disk."
        )


def write_json(path: Path, content: Any) -> None:
    """JSON with sorted keys, so that equal content is equal bytes."""
    with written_whole(path) as file:
        file.write(_json_bytes(content))


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def file_digest(*paths: Path) -> str:
    """sha256 of the bytes of some files, one after the other."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                hasher.update(chunk)
    return hasher.hexdigest()


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError: `missing` where there is no file, else what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object.")
    return content


def read_config(path: Path, missing: str) -> dict[str, Any]:
    """A config.json. Raises UserError as `read_json`, and where it cannot be that of a model."""
    return check_config(read_json(path, missing), path)


@contextlib.contextmanager
def open_tensors(path: Path, framework: Literal["np", "pt"], advice: str, device: str = "cpu") -> Iterator[Any]:
    """A safetensors file, as `safe_open` gives it. Raises UserError, which ends with `advice`, where it is missing, cut
    short or damaged, or does not hold what is asked of it within."""
    try:
        with safe_open(path, framework, device) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {advice}") from None
    except (SafetensorError, OSError, RuntimeError, *MALFORMED) as error:  # torch raises RuntimeError
        raise UserError(f"{path} is cut short or damaged ({error}). {advice}") from error


def write_sealed(path: Path, content: bytes) -> None:
    """Write a safetensors file, whole or not at all. Its metadata must hold `"sha256": SEAL`, as JSON in a value or by
    itself; the digest of the content takes its place. Equal content gives equal bytes."""
    place, digest = content.index(SEAL.encode()), hashlib.sha256(content).hexdigest()
    with written_whole(path) as file:
        file.write(content[:place])
        file.write(digest.encode())
        file.write(memoryview(content)[place + len(SEAL) :])


def check_sealed(path: Path) -> None:
    """Raises UserError where a file is not as `write_sealed` wrote it."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), 2**27))
        found = re.search(rb'sha256\\?": ?\\?"([0-9a-f]{64})', header)
        seal = found[1] if found else b""
        hasher = hashlib.sha256(length + header.replace(seal, SEAL.encode(), 1))
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    if hasher.hexdigest().encode() != seal:
        raise UserError(f"{path} is not as it was written. {AGAIN}")


def inside(folder: Path, path: Path) -> Path:
    """`path`, which lies in `folder` also when links are followed. Raises UserError where it leads out of it.

    The hub's cache has links from each snapshot to the blobs that stand beside all of them.
    """
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise UserError(f"{path} leads out of {folder}, to {path.resolve()}. Put a copy there if that is wanted.")
    return path


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
    codec: str
    shape: tuple[int, ...]
    planes: Planes
    facts: dict[str, Any] = field(default_factory=dict)


def decoded(tensor: StoredTensor) -> NDArray[np.float32]:
    """A stored tensor's values, float32 in its own shape. Raises UserError where the planes do not fit the codec."""
    try:
        return codec(tensor.codec).decode(tensor.planes, tensor.shape[-1]).reshape(tensor.shape)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{tensor.name} cannot be decoded as {tensor.codec}: {error}.") from error


class Artifact:
    """An artifact folder, complete or in the making."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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

    def damaged(self) -> list[str]:
        """Files of a finished artifact that are gone, or not as they were written. Raises UserError as `manifest`."""

        def is_whole(name: str, expected: str) -> bool:
            path = inside(self.folder, self.folder / name)
            return path.is_file() and file_digest(path) == expected

        with well_formed(self.folder / "manifest.json", ANEW):
            return [name for name, expected in self._manifest()["files"].items() if not is_whole(name, expected)]

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
        facts = {"codec": tensor.codec, "shape": list(tensor.shape), "facts": tensor.facts, "sha256": SEAL}
        contiguous = {name: np.ascontiguousarray(plane) for name, plane in tensor.planes.items()}
        content = safetensors.numpy.save(contiguous, {"lqexport": json.dumps(facts, sort_keys=True)})
        write_sealed(self._path(tensor.name), content)

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
        if (tensor.codec, tensor.shape, digest(tensor.planes)) != (codec, shape, sha256):
            raise UserError(
                f"Tensor {name} in {self.folder} is not the one that its manifest lists: the artifact is damaged. "
                f"{ANEW}"
            )
        return tensor

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
            entry = {"name": name, "codec": tensor.codec, "shape": list(tensor.shape), "sha256": digest(tensor.planes)}
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
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
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
    codec(entry["codec"]).layout(rows, columns)
    return entry


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """The file of a manifest, with the sha256 of the rest of it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return _json_bytes(rest | {"sha256": hashlib.sha256(_json_bytes(rest)).hexdigest()})


class SolvedModel:
    """The tensors that an artifact holds so far, as a model's weights (see `lqexport.weights`), read one at a time."""

    def __init__(self, artifact: Artifact, config: dict[str, Any], names: list[str]) -> None:
        self._artifact, self.config, self._names = artifact, config, names

    def names(self) -> list[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._artifact.read(name).shape

    def read(self, name: str) -> torch.Tensor:
        return torch.from_numpy(decoded(self._artifact.read(name)))
