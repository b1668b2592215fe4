"""Safetensors files: opening them with a helpful error, and sealing them with a digest of their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from lqexport.errors import AGAIN, MALFORMED, UserError
from lqexport.storage.files import written_whole
from lqexport.storage.stand_ins import stand_in

if TYPE_CHECKING:
    import torch

SEAL = "0" * 64
"""The placeholder in a safetensors file's metadata while the sha256 of the file is computed, which then replaces it."""

SMALL = 1 << 20
"""Bytes of a tensor up to which the header of a file of thousands of tensors takes longer to parse than it to read."""
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "I32": "int32", "U8": "uint8"}
"""safetensors' names of the dtypes that `small_tensor` reads, and torch's."""


@contextlib.contextmanager
def open_tensors(path: Path, framework: Literal["np", "pt"], advice: str, device: str = "cpu") -> Iterator[Any]:
    """Opens a safetensors file, as `safe_open` does.

    advice   the end of the error message: what the user can do

    Raises UserError if the file is missing, cut short or damaged, or if it lacks a tensor that is read in the context.
    """
    try:
        with safe_open(path, framework, device) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {advice}") from None
    except (SafetensorError, OSError, RuntimeError, *MALFORMED) as error:  # torch raises RuntimeError
        raise UserError(stand_in(path) or f"{path} is cut short or damaged ({error}). {advice}") from error


def forms(file: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the dtype (by safetensors' name, such as BF16) and the shape of each tensor in an opened file."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return {name: (str(header.get_dtype()), tuple(header.get_shape())) for name, header in slices.items()}


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Returns the offset of the first byte and the number of bytes of each tensor in a safetensors file.

    `open_tensors` must be able to open the file; nothing is checked here.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + length + start, end - start) for name, (start, end) in offsets.items()}


def small_tensor(path: Path, span: tuple[int, int], dtype: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Returns a tensor of a safetensors file without opening the file as such, which parses the header of all tensors.

    span    the tensor's offset and number of bytes, as in `spans`
    dtype   by safetensors' name

    None for a tensor of more than SMALL bytes, which costs more than the header and is best mapped, and for an empty
    one or another dtype than DTYPES has. Raises UserError if the file is cut short.
    """
    start, nbytes = span
    if not 0 < nbytes <= SMALL or dtype not in DTYPES:
        return None
    with path.open("rb") as file:
        file.seek(start)
        content = bytearray(file.read(nbytes))
    if len(content) < nbytes:
        raise UserError(f"{path} is cut short. Download it again.")
    import torch  # takes seconds, which those who read no tensor do not wait for

    return torch.frombuffer(content, dtype=getattr(torch, DTYPES[dtype])).reshape(shape)


def write_sealed(path: Path, content: bytes, *, wait: bool = False) -> None:
    """Writes a safetensors file that carries its own digest, completely or not at all.

    content   the file; its metadata must hold `"sha256": SEAL`, as an entry or within the JSON text of an entry. The
              sha256 of `content` replaces SEAL. Equal content gives equal bytes
    wait      as in `written_whole`

    Raises UserError as `written_whole` does.
    """
    seal_start, digest = content.index(SEAL.encode()), hashlib.sha256(content).hexdigest()
    with written_whole(path, wait=wait) as file:
        file.write(content[:seal_start])
        file.write(digest.encode())
        file.write(memoryview(content)[seal_start + len(SEAL) :])


def check_sealed(path: Path) -> None:
    """Raises UserError if a file no longer has the digest that `write_sealed` stored in it."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), 2**27))
        match = re.search(rb'sha256\\?": ?\\?"([0-9a-f]{64})', header)
        seal = match[1] if match else b""
        hasher = hashlib.sha256(length + header.replace(seal, SEAL.encode(), 1))
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    if hasher.hexdigest().encode() != seal:
        raise UserError(f"{path} is not as it was written. {AGAIN}")
