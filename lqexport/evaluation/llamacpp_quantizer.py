"""Calls llama.cpp's quantizer, for comparisons."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from lqexport.converters.gguf.imatrix import read_imatrix
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import library, structure, threads_or_all
from lqexport.storage.files import unfinished

_ImatrixEntry = structure(
    "llama_model_imatrix_data",
    """c_char_p name
    c_void_p data
    c_size_t size""",
)


def quantize(
    source: Path,
    out: Path,
    file_type: str,
    *,
    imatrix: Path | Mapping[str, NDArray[np.float32]] | None = None,
    pure: bool = False,
    token_embedding: str | None = None,
    output: str | None = None,
    requantize: bool = False,
    threads: int | None = None,
) -> None:
    """Quantizes a GGUF file with llama.cpp, as `llama-quantize source out file_type` does.

    `out` appears complete or not at all.

    file_type        the type by llama-quantize's name: `Q4_K_M`, `Q3_K_S`, `F32`, ...
    imatrix          a file of `make_imatrix` or llama-imatrix, or the mean of x^2 per column by GGUF weight name
    pure             whether every matrix gets the same type, without the type's mix
    token_embedding, output   the tensor types of these two, such as `Q8_0`; None: llama.cpp's choice
    requantize       whether the source may be quantized itself; its decoded values are then rounded again
    threads          the number of CPU threads; None: all cores

    Raises UserError for an unknown type or a damaged imatrix, or, with llama.cpp's reason, if llama.cpp refuses.
    """
    llama, log = library()
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = _file_type(file_type)
    parameters.nthread, parameters.pure, parameters.allow_requantize = threads_or_all(threads), pure, requantize
    if token_embedding is not None:
        parameters.token_embedding_type = _tensor_type(token_embedding)
    if output is not None:
        parameters.output_tensor_type = _tensor_type(output)
    # Kept in variables, since the struct only holds pointers into them.
    means = _contiguous(read_imatrix(imatrix).means if isinstance(imatrix, Path) else imatrix or {})
    entries = _imatrix_entries(means)
    if means:
        parameters.imatrix = ctypes.addressof(entries)
    log.said()
    with _renamed(out) as temporary:
        if llama.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), ctypes.byref(parameters)) != 0:
            raise UserError(f"llama.cpp cannot quantize {source} to {file_type}.{log.said()}")


@contextlib.contextmanager
def _renamed(out: Path) -> Iterator[Path]:
    """Gives a path beside `out`. The file there is renamed to `out` on success, and removed on failure."""
    temporary = unfinished(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _file_type(name: str) -> int:
    """Returns the `llama_ftype` of a name. gguf-py spells the names ALL_F32 and MOSTLY_<name>."""
    known = {entry.name.removeprefix("MOSTLY_").removeprefix("ALL_"): entry.value for entry in gguf.LlamaFileType}
    if name not in known:
        raise UserError(f"llama.cpp has no file type {name!r}. Known: {', '.join(known)}.")
    return known[name]


def _tensor_type(name: str) -> int:
    """Returns the `ggml_type` of a name."""
    known = {entry.name: entry.value for entry in gguf.GGMLQuantizationType}
    if name not in known:
        raise UserError(f"llama.cpp has no tensor type {name!r}. Known: {', '.join(known)}.")
    return known[name]


def _contiguous(means: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    return {name: np.ascontiguousarray(mean, dtype=np.float32).ravel() for name, mean in means.items()}


def _imatrix_entries(means: dict[str, NDArray[np.float32]]) -> ctypes.Array[Any]:
    """Returns the C array of importance data, which ends with an entry without a name. It points into `means`."""
    rows = [_ImatrixEntry(name.encode(), mean.ctypes.data, mean.size) for name, mean in means.items()]
    return (_ImatrixEntry * (len(rows) + 1))(*rows)
