"""Sizes as users write and read them: amounts of memory, of a model, of a file."""

from __future__ import annotations

import re
from collections.abc import Callable

from lqexport.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
NUMBER = r"(\d+\.?\d*|\.\d+)\s*"


def human_bytes(count: float) -> str:
    """For example `98.4 MB`, in powers of 1000, as disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def memory_size(text: str) -> int:
    """Bytes of an amount of memory such as 24GB or 64GiB. Raises UserError for anything else."""
    found = _bytes(text)
    if found is None:
        raise UserError(f"An amount of memory is like 24GB or 64GiB, not {text!r}.")
    return found


def model_size(text: str, weights: int, mix_bytes: Callable[[str], int]) -> int:
    """Bytes of tensor data that a size means: `4.25bpw` (of all `weights`), `3.9GB`, `700MiB`, or a target such as
    `Q4_K_M`, whose bytes `mix_bytes` knows. Raises UserError for anything else."""
    if bits := re.fullmatch(NUMBER + "bpw", text.strip(), re.IGNORECASE):
        return int(float(bits[1]) * weights / 8)
    if (found := _bytes(text)) is not None:
        return found
    if text[:1].isdigit():
        raise UserError(f"A size is like 4.25bpw, 3.9GB, 700MiB or Q4_K_M, not {text!r}.")
    return mix_bytes(text if ":" in text else f"gguf:{text}")


def split_size(text: str) -> int:
    """Bytes of a size such as `2G` or `500M`, powers of 1000 as in llama.cpp. Raises UserError for anything else."""
    found = re.fullmatch(r"([1-9]\d*)([KMG])", text)
    if found is None:
        raise UserError(f"The most that a file may hold is like 2G, 500M or 800K, not {text!r}.")
    return int(found[1]) * UNITS[found[2]]


def _bytes(text: str) -> int | None:
    """Bytes of a number with a unit, in capitals or not; None for anything else."""
    found = re.fullmatch(NUMBER + "([KMGT]I|[KMGT]|)B", text.strip(), re.IGNORECASE)
    return int(float(found[1]) * UNITS[found[2].upper()]) if found else None
