"""What the options of tensors are predicted to cost: measured once, for every size, beside the second moments."""

from __future__ import annotations

from pathlib import Path

from lqexport.allocate import Option
from lqexport.artifact import read_json, write_json
from lqexport.formats.codec import nbytes
from lqexport.formats.registry import codec

Losses = dict[str, dict[str, float]]
"""Tensor -> codec -> predicted loss."""


class Measured:
    """Losses found so far, kept on disk, each part of them in a file of its own: several processes may write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def losses(self) -> Losses:
        """All of them, whoever found them."""
        return {name: kinds for path in self._folder.glob("*.json") for name, kinds in read_json(path, "").items()}

    def add(self, part: str, losses: Losses) -> None:
        """Keep more, under the name of a block or a tensor."""
        write_json(self._folder / f"{part}.json", losses)


def options(losses: dict[str, float], shape: tuple[int, int]) -> list[Option]:
    """The options of a tensor of shape [rows, columns], from the losses of its codecs."""
    return [Option(kind, nbytes(codec(kind), *shape), loss) for kind, loss in losses.items()]
