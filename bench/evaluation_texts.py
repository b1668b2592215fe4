"""Writes the evaluation texts "chat" and "code" of the documentation's tables.

    python bench/evaluation_texts.py FOLDER

`chat.jsonl` is a copy of bench/texts/chat.jsonl. `code.txt` is made of files that are installed: Python's `statistics`
and `tarfile`, and two C++ headers of PyTorch. They take turns of some 2500 characters, so a few windows hold both
languages. Prints the sha256 of each file: that of the code differs between versions of Python or PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tarfile
from itertools import zip_longest
from pathlib import Path

import torch

HEADERS = ("c10/util/SmallVector.h", "ATen/TensorIterator.h")
TURN = 2500
"""Characters of a source before it is the next one's turn."""
SKIPPED, USED = 5000, 40000
"""Characters at the head of a source that are left out (licence, introduction), and how many after them are used."""


def sources() -> list[str]:
    """Returns the text of each source, Python and C++ in turns."""
    headers = [Path(torch.__file__).parent / "include" / name for name in HEADERS]
    modules = [Path(module.__file__) for module in (statistics, tarfile)]
    paths = [path for pair in zip(modules, headers, strict=True) for path in pair]
    return [path.read_text(encoding="utf-8") for path in paths]


def turns(source: str) -> list[str]:
    """Returns the used part of a source as pieces of whole lines, each of TURN characters or a line more."""
    pieces, piece = [], ""
    whole = source[SKIPPED : SKIPPED + USED].splitlines(keepends=True)[1:-1]  # the first and last may be cut
    for line in whole:
        piece += line
        if len(piece) >= TURN:
            pieces, piece = [*pieces, piece], ""
    return [*pieces, piece] if piece else pieces


def code() -> str:
    """Returns the pieces of all sources in turns, joined by blank lines."""
    rounds = zip_longest(*(turns(source) for source in sources()), fillvalue="")
    return "\n".join(piece for turn in rounds for piece in turn if piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(__file__).parent / "texts" / "chat.jsonl", folder / "chat.jsonl")
    (folder / "code.txt").write_text(code(), encoding="utf-8")
    for name in ("chat.jsonl", "code.txt"):
        print(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {folder / name}")


if __name__ == "__main__":
    main()
