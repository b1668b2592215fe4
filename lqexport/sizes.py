"""Parses and prints sizes as users write them: of memory, of a model, of a file."""

from __future__ import annotations

import re
from collections.abc import Callable

from lqexport.errors import UserError
from lqexport.target import Target, full_name

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
NUMBER = r"(\d+\.?\d*|\.\d+)\s*"


def human_bytes(count: float) -> str:
    """Returns a number of bytes as text in powers of 1000, for example `98.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def memory_size(text: str) -> int:
    """Returns the bytes of an amount of memory such as 24GB or 64GiB. Raises UserError for anything else."""
    count = _bytes(text)
    if count is None:
        raise UserError(f"An amount of memory is like 24GB or 64GiB, not {text!r}.")
    return count


def model_size(text: str, weights: int, mix_bytes: Callable[[str], int]) -> int:
    """Returns the bytes of tensor data that a target size stands for. Raises UserError for any other text.

    text        bits per weight (`4.25bpw`), bytes (`3.9GB`, `700MiB`), or a target whose size is meant (`Q4_K_M`)
    weights     the number of weights of the model, for bits per weight
    mix_bytes   returns the bytes of a target by its full name, such as `gguf:Q4_K_M`
    """
    if bits := re.fullmatch(NUMBER + "bpw", text.strip(), re.IGNORECASE):
        return int(float(bits[1]) * weights / 8)
    if (count := _bytes(text)) is not None:
        return count
    if text[:1].isdigit():
        raise UserError(f"A size is like 4.25bpw, 3.9GB, 700MiB or Q4_K_M, not {text!r}.")
    return mix_bytes(full_name(text))


def size_bits(text: str, weights: Callable[[], int]) -> int | None:
    """Returns the bits per weight that a target size stands for, rounded down; None if the text is no size.

    text      as for `model_size`; a mix has the bits of its name
    weights   returns the number of weights of the model, for a size in bytes
    """
    if bits := re.fullmatch(NUMBER + "bpw", text.strip(), re.IGNORECASE):
        return int(float(bits[1]))
    if (count := _bytes(text)) is not None:
        return 8 * count // weights()
    return Target.parse(full_name(text)).bits


def split_size(text: str) -> int:
    """Returns the bytes of a size such as `2G` or `500M`, in powers of 1000 as llama.cpp counts.

    Raises UserError for anything else.
    """
    match = re.fullmatch(r"([1-9]\d*)([KMG])", text)
    if match is None:
        raise UserError(f"The most that a file may hold is like 2G, 500M or 800K, not {text!r}.")
    return int(match[1]) * UNITS[match[2]]


def _bytes(text: str) -> int | None:
    """Returns the bytes of a number with a unit such as GB or GiB, in any case; None for any other text."""
    match = re.fullmatch(NUMBER + "([KMGT]I|[KMGT]|)B", text.strip(), re.IGNORECASE)
    return int(float(match[1]) * UNITS[match[2].upper()]) if match else None
