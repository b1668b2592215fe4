"""Keeps tensors in a file of the work folder, so that a stopped run does not compute them again."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import Tensor

from lqexport.errors import AGAIN
from lqexport.storage.tensor_files import SEAL, check_sealed, open_tensors, write_sealed


def keep_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors of any names, completely or not at all. Raises UserError if the disk is full."""
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_sealed(path, safetensors.torch.save(contiguous, {"sha256": SEAL}))


def kept_tensors(path: Path) -> dict[str, Tensor]:
    """Returns what `keep_tensors` wrote. Raises UserError if the file is damaged."""
    with open_tensors(path, "pt", AGAIN) as file:
        check_sealed(path)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
