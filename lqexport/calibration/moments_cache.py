"""Keeps second moments on disk, so that several runs over the same source and calibration collect them once.

FOLDER/KEY/facts.json             what they belong to: source, calibration, type of moments
FOLDER/KEY/block-N.safetensors    one tensor per group of linears; its name is the linears' names, joined by "+"
FOLDER/KEY/NAME-KEY/TENSOR.json   what was measured with them: losses of types, mixes of widths

A KEY is made of the facts (16 hexadecimal digits of a SHA-256). Runs that fill one folder at once write the same files:
each waits while another writes the file, and writes it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

from lqexport.calibration.block_collector import BlockMoments
from lqexport.errors import AGAIN
from lqexport.storage.files import write_json
from lqexport.storage.tensor_files import SEAL, check_sealed, open_tensors, write_sealed


class MomentsCache:
    """The folder of the second moments that `facts` (JSON values) identify, under `folder`."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder = folder / _key(facts)
        self._facts = facts

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index}.safetensors"

    def __contains__(self, index: int) -> bool:
        return self._path(index).is_file()

    def write_facts(self) -> None:
        """Writes facts.json, which says what the second moments belong to."""
        write_json(self.folder / "facts.json", self._facts, wait=True)

    def measured(self, name: str, facts: dict[str, Any]) -> Path:
        """Returns the folder for measurements made with these second moments; `facts` say what else they depend on."""
        return self.folder / f"{name}-{_key(facts)}"

    def write(self, moments: BlockMoments) -> None:
        """Writes the second moments of all linears of a block."""
        index, groups = moments
        tensors = {"+".join(group): hessian.cpu() for group, hessian in groups.items()}
        write_sealed(self._path(index), safetensors.torch.save(tensors, {"sha256": SEAL}), wait=True)

    def read(self, index: int) -> BlockMoments:
        """Returns the second moments of a block, on the host. Raises UserError if the file is damaged."""
        path = self._path(index)
        with open_tensors(path, "pt", AGAIN) as file:
            check_sealed(path)
            return index, {tuple(name.split("+")): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def fill(self, computed: Iterator[BlockMoments]) -> Iterator[BlockMoments]:
        """Passes `computed` on, and writes every block before that."""
        for moments in computed:
            self.write(moments)
            yield moments


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
