"""The types that llama.cpp's quantizer gives the tensors of a file in one of its mixes, by a dry run."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from lqexport.evaluation import llamacpp, llamacpp_quantizer

LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+),.*?(?:\((\w+)\))?$")
"""What the quantizer says of a tensor: its name, its type in the source, and its new type if it is another."""
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def types_by_llamacpp(source: Path, mix: str) -> dict[str, str]:
    """Returns GGUF name -> type of each tensor of a file in one of `MIXES`.

    An importance matrix of ones is given for the mixes that need it or whose rules ask for it.
    """
    llama, log = llamacpp.library()
    parameters = llama.llama_model_quantize_default_params()
    name = {"Q2_K_M": "Q2_K", "Q6_K_M": "Q6_K"}.get(mix, mix.removesuffix("_MIX"))
    parameters.ftype, parameters.nthread, parameters.dry_run = llamacpp_quantizer._file_type(name), 1, True
    ones = llamacpp_quantizer._contiguous(_ones(source) if mix.startswith("IQ") or mix == "Q2_K_S" else {})
    entries = llamacpp_quantizer._imatrix_entries(ones)
    if ones:
        parameters.imatrix = ctypes.addressof(entries)
    lines: list[str] = []

    def keep(_level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode())

    callback = CALLBACK(keep)
    llama.llama_log_set(callback, None)
    try:
        done = llama.llama_model_quantize(os.fsencode(source), os.fsencode(source), ctypes.byref(parameters))
    finally:
        llama.llama_log_set(log.callback, None)
    assert done == 0, lines[-5:]
    said = [LINE.match(line.strip()) for line in "".join(lines).splitlines()]
    return {match[1]: (match[3] or match[2]).upper() for match in said if match}


def _ones(source: Path) -> dict[str, np.ndarray]:
    """Returns an importance of 1 for each column of each matrix, and of each expert, by GGUF name."""
    columns = {tensor.name: int(tensor.shape[0] * np.prod(tensor.shape[2:])) for tensor in GGUFReader(source).tensors}
    return {name: np.ones(count, np.float32) for name, count in columns.items() if name.endswith(".weight")}
