"""Reads and writes files: complete or not at all, by one process at a time, and without trust in their content."""

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
from lqexport.storage.stand_ins import stand_in

NAME_BYTES = 255
"""Bytes of the longest name of a file or folder on common file systems."""


@contextlib.contextmanager
def written_whole(path: Path, *, wait: bool = False) -> Iterator[BinaryIO]:
    """Opens a binary file that appears at `path` complete or not at all: written beside it, synced, then renamed.

    wait   whether to wait while another process writes the same file, and then to write it again

    Raises UserError if the disk is full, if the path cannot be written, or, without `wait`, if another process is
    writing the same file. The half-written file is removed.
    """
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_file(temporary, wait) as file:
            try:
                file.truncate()
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)  # from here on, the temporary name may be another process's
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def unfinished(path: Path) -> Path:
    """Returns the path of a file while it is being written; it stays there if the process is killed."""
    return path.with_name(f".{path.name}.part")


@contextlib.contextmanager
def _locked_file(path: Path, wait: bool) -> Iterator[BinaryIO]:
    """Opens a binary file, without truncating it, and locks it against other processes until it is closed.

    wait   whether to wait for another process that holds the lock. Raises UserError as `_lock` does if not
    """
    while True:
        with open(path, "wb", opener=_without_truncating) as file:
            if not wait:
                _lock(file.fileno(), path)
            else:
                with contextlib.suppress(OSError):  # this file system has no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_at(file.fileno(), path):
                    continue  # the other process has given it its final name, or removed it
            yield file
            return


def _without_truncating(path: str, flags: int) -> int:
    """Opens a file without truncating it, since another process may be writing it."""
    return os.open(path, flags & ~os.O_TRUNC, 0o666)


def _lock(descriptor: int, path: Path) -> None:
    """Locks the open file or folder `path` against other processes until it is closed, however this process ends.

    Raises UserError if another process holds the lock, or has just renamed its finished file away from `path`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another process is writing {path}. Wait for it, or write somewhere else.") from None
    except OSError:
        return  # this file system has no locks
    if not _is_at(descriptor, path):
        raise UserError(f"Another process has just written what {path} was for. Run the same command again.")


def _is_at(descriptor: int, path: Path) -> bool:
    """Returns whether an open file or folder is still what has the path: another process may have renamed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Syncs a folder's file names to disk. Otherwise a crash may lose one rename and keep a later one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> UserError:
    """Returns the UserError for a file system error that was raised while `path` was written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"The disk is full: cannot write {path}. Free some space and run the same command again.")
    return UserError(f"Cannot write {path}: {error.strerror or error}.")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Reserves `folder` for this process while the context is open.

    The folder is created if it is missing, and then removed at the end if it is still empty. Raises UserError, and
    leaves the folder, if another process has claimed it. Raises UserError if it cannot be created.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        _lock(descriptor, folder)
        try:
            yield
        finally:
            if created and _is_at(descriptor, folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()
    finally:
        os.close(descriptor)


def copy_files(folder: Path, paths: Iterable[Path], to: Path) -> None:
    """Copies files of `folder` to the same relative paths in the folder `to`, each completely or not at all.

    Raises UserError for a link that leads out of `folder`, since its content may not be meant for publication.
    """
    for path in paths:
        with inside(folder, path).open("rb") as original, written_whole(to / path.relative_to(folder)) as copy:
            shutil.copyfileobj(original, copy)


def inside(folder: Path, path: Path) -> Path:
    """Returns `path` unchanged if it lies in `folder` after links are followed. Raises UserError if it does not.

    In the hub's cache, files of a snapshot are links to blobs in a folder beside all snapshots; these are allowed.
    """
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    if not path.resolve().is_relative_to(root):
        raise UserError(f"{path} leads out of {folder}, to {path.resolve()}. Put a copy there if that is wanted.")
    return path


def check_new(path: Path) -> None:
    """Raises UserError if there is a file or folder at a path that is to be written, or as `check_writable`."""
    check_writable(path)
    if path.exists():
        raise UserError(f"{path} exists. Delete it, or choose another name.")


def check_path(path: str | Path) -> None:
    """Raises UserError for a name that JSON and GGUF files cannot hold, as it is not UTF-8, or that is too long."""
    for name in Path(path).parts:
        try:
            stored = os.fsencode(name)  # its bytes, also where the locale is not UTF-8
            stored.decode()
        except UnicodeError:
            raise UserError(f"The name {path} is not UTF-8. Choose another.") from None
        if len(stored) > NAME_BYTES:
            raise UserError(f"The name {name} has {len(stored)} bytes, and file systems take {NAME_BYTES}.")


def check_writable(path: Path) -> None:
    """Raises UserError if the folder in which a file or folder is to be written is a file, or cannot be written, or as
    `check_path`."""
    check_path(path)
    folder = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"{folder} cannot be written. Choose another folder for {path.name}.")


def check_outputs(*, files: Iterable[Path | None] = (), folders: Iterable[Path | None] = ()) -> None:
    """Raises UserError if files or folders that may be replaced cannot be written. None stands for none."""
    for paths, is_folder in ((files, False), (folders, True)):
        for path in filter(None, paths):
            check_writable(path)
            if path.exists() and path.is_dir() != is_folder:
                raise UserError(f"{path} is a {'file' if is_folder else 'folder'}. Choose another name.")


def check_space(path: Path, size: int) -> None:
    """Raises UserError if the disk of a new file or folder `path` lacks room for `size` bytes of tensors.

    32 MiB are added for metadata, which is enough for any model.
    """
    parent_folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    needed, free = size + 2**25, shutil.disk_usage(parent_folder).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB, but {parent_folder} has {free / 1e9:.2f} GB free. "
            "Free some space or write to another disk."
        )


def write_json(path: Path, content: Any, *, wait: bool = False) -> None:
    """Writes `content` as JSON with sorted keys, so that equal content gives equal bytes.

    `wait` as in `written_whole`. Raises UserError as that does.
    """
    with written_whole(path, wait=wait) as file:
        file.write(json_bytes(content))


def json_bytes(content: Any) -> bytes:
    """Returns the bytes that `write_json` writes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """Returns the JSON object in a file.

    missing   the error message if there is no file

    Raises UserError if the file is missing, cannot be read as JSON, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(stand_in(path) or f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it should hold a JSON object.")
    return content


def optional_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} if there is no file. Raises UserError if the file is damaged."""
    return read_json(path, f"{path} is gone.") if path.is_file() else {}


def file_digest(*paths: Path) -> str:
    """Returns the sha256 (hex) of the concatenated bytes of the files."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                hasher.update(chunk)
    return hasher.hexdigest()
