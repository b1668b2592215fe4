"""Keeps the hidden states that enter a block in files, so that a stopped run goes on there instead of at the first one.

With a quantized prefix every block depends on the blocks before it. Without these files a resumed run would pass
through all of them again, in both models.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from torch import Tensor

from lqexport.pipeline.kept_tensors import keep_tensors, kept_tensors

SECONDS = 60.0
"""Hidden states are kept when so many seconds have passed since the last time: writing must not slow a run down whose
blocks take a second each, and a stopped run then repeats passes of a minute's work."""


class KeptStates:
    """The hidden states of all sequences that enter one block, in a file for each shard of the sequences.

    folder   gets a folder for each block whose inputs are kept, named by the block's index
    shards   the number of shards
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self._folder, self._shards = folder, shards
        self._since = time.monotonic()

    def _path(self, index: int, shard: int) -> Path:
        return self._folder / str(index) / f"{shard}.safetensors"

    def _indices(self) -> list[int]:
        """Returns the numbers of the blocks that have a folder. Files of others, such as .DS_Store, do not count."""
        entries = self._folder.iterdir() if self._folder.is_dir() else ()
        return [int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir()]

    def last(self, most: int) -> int:
        """Returns the last block, `most` at most, whose inputs are kept for all shards; 0 if there is none."""
        kept = (index for index in self._indices() if index <= most)
        whole = (index for index in kept if all(self._path(index, shard).is_file() for shard in range(self._shards)))
        return max(whole, default=0)

    def is_due(self) -> bool:
        """Returns whether it is time to keep hidden states again."""
        return time.monotonic() - self._since >= SECONDS

    def write(self, index: int, shard: int, states: dict[str, Tensor]) -> None:
        """Keeps a shard's hidden states, by any names. Raises UserError if the disk is full."""
        keep_tensors(self._path(index, shard), states)

    def read(self, index: int, shard: int) -> dict[str, Tensor]:
        """Returns what `write` kept. Raises UserError if the file is damaged."""
        return kept_tensors(self._path(index, shard))

    def leave_only(self, index: int) -> None:
        """Removes what is kept of other blocks, once all shards of block `index` are written."""
        for other in self._indices():
            if other != index:
                shutil.rmtree(self._folder / str(other), ignore_errors=True)  # NFS keeps open files as .nfs...
        self._since = time.monotonic()
