"""The sizes of a file, its most frequent type, and whether that is the type in its name."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import LlamaFileType

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, warning
from lqexport.converters.gguf.mixes import FALLBACKS

NAMED = re.compile(r"(?<![A-Za-z0-9])((?:IQ|TQ|Q)\d(?:_[A-Z0-9]+)*|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32)(?![A-Za-z0-9])")
"""Matches a type in the name of a file in upper case: `Q4_K_M`, `IQ4_XS`, `BF16`."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a file.

    type     the type that holds most of the weights
    nbytes   bytes of all tensors
    """

    tensors: int
    weights: int
    nbytes: int
    type: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.weights)


def sizes_of(file: OpenFile) -> Sizes:
    """Returns the sizes of a file."""
    by_type: Counter[str] = Counter()
    for tensor in file.tensors.values():
        by_type[tensor.tensor_type] += math.prod(tensor.shape)
    most = by_type.most_common(1)[0][0] if by_type else ""
    nbytes = sum(tensor.nbytes for tensor in file.tensors.values())
    return Sizes(len(file.tensors), sum(by_type.values()), nbytes, most)


def check_name(file: OpenFile) -> Iterator[Problem]:
    """Yields a warning if the name of the file, or `general.file_type`, names a type that the file does not have."""
    present = {tensor.tensor_type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if not present:
        return
    listed = ", ".join(sorted(present))
    said = _file_type(file)
    if (match := NAMED.search(file.path.name.upper())) and not _is_among(match[1], present) and match[1] != said:
        yield warning("name", f"The name says {match[1]}, and the matrices are of {listed}.")
    if said and not _is_among(said, present):
        yield warning("name", f"general.file_type says {said}, and the matrices are of {listed}.")


def _file_type(file: OpenFile) -> str | None:
    """Returns the name that `general.file_type` stands for; None where it is missing, guessed or unknown."""
    number = file.metadata.get("general.file_type")
    names = {int(member): member.name for member in LlamaFileType if member != LlamaFileType.GUESSED}
    return re.sub("^(MOSTLY|ALL)_", "", names[number]) if isinstance(number, int) and number in names else None


def _is_among(name: str, present: set[str]) -> bool:
    """Returns whether a file with matrices of the types `present` may bear the name of a type or mix."""
    base = re.sub(r"_(XL|L|M|S|XS|MOE|MIX)$", "", name) if name not in present else name
    family = {other for other in present if other.startswith(base[:3]) and base.startswith("IQ")}
    return bool({name, base, FALLBACKS.get(base), *family} & present)
