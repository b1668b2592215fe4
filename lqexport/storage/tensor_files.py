"""Safetensors files: opened with an error that helps, and sealed with a digest of their own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from lqexport.errors import AGAIN, MALFORMED, UserError
from lqexport.storage.files import written_whole

SEAL = "0" * 64
"""Stands in the metadata of a safetensors file for the sha256 of the file, while that is computed."""


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


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of each tensor in a safetensors file that `open_tensors` can open."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + start, end - start) for name, (start, end) in offsets.items()}


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
