"""Files of any kind: written whole or not at all, by one process at a time, and read without trust in what they say."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lqexport.errors import UserError


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` whole or not at all: written beside it, synced, then renamed.

    Raises UserError where the disk is full or the place cannot be written, and where another process is writing the
    same file; the half-written file is removed.
    """
    temporary = unfinished(path)
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


def unfinished(path: Path) -> Path:
    """Where a file is while it is being written, and stays if the process is killed."""
    return path.with_name(f".{path.name}.part")


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


def inside(folder: Path, path: Path) -> Path:
    """`path`, which lies in `folder` also when links are followed. Raises UserError where it leads out of it.

    The hub's cache has links from each snapshot to the blobs that stand beside all of them.
    """
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise UserError(f"{path} leads out of {folder}, to {path.resolve()}. Put a copy there if that is wanted.")
    return path


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
        file.write(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


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


def file_digest(*paths: Path) -> str:
    """sha256 of the bytes of some files, one after the other."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                hasher.update(chunk)
    return hasher.hexdigest()
