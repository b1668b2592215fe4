"""The time saved by writing the last tensor and reading the next block while the solver works.

    python bench/overlap.py --work FOLDER [--layers 2] [--hidden 4096] [--intermediate 14336] [--times 3]

lqexport/storage/background.py does this work. The script makes the same runs with and without it, in turns, on a random
Llama, and drops the Llama's files from the system's cache before each run. One run rounds to Q4_0, which leaves the
least other work. The other solves Q4_K from 2 x 32 tokens with one sweep. Prints Markdown: the least seconds with and
without, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from depth import write_model

from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage import background

SOLVED = {"samples": 2, "sequence_length": 32, "descent": 1, "moments": "normalized", "prefix": "full"}
RUNS = {"rounded to Q4_0": ("gguf:Q4_0", {"method": "rtn"}), "solved in Q4_K": ("gguf:Q4_K", SOLVED)}


def forget(folder: Path) -> None:
    """Drops a folder's files from the system's cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def at_once(_: background.OneBehind, work: Callable[[], None]) -> None:
    """Does the work now, in place of `OneBehind.start`."""
    work()


def seconds(model: Path, out: Path, target: str, options: dict[str, object], overlap: bool) -> float:
    """Quantizes the model, with or without overlap. Returns the seconds."""
    forget(model)
    shutil.rmtree(out, ignore_errors=True)
    kept = background.OneBehind.start, background._read
    if not overlap:
        background.OneBehind.start, background._read = at_once, lambda locations: None  # type: ignore[method-assign]
    recipe = Recipe(str(model), target, calibration=str(model / "text.txt"), tune=0, **options)  # type: ignore[arg-type]
    began = time.perf_counter()
    try:
        quantize(recipe, out)
    finally:
        background.OneBehind.start, background._read = kept  # type: ignore[method-assign]
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    model = arguments.work / "model"
    if not model.exists():
        write_model(model, arguments.layers, arguments.hidden, arguments.intermediate, 512)
    print("| | without | with | ratio |\n|---|---|---|---|")
    for name, (target, options) in RUNS.items():
        least = {False: float("inf"), True: float("inf")}
        for turn in range(2 * arguments.times):
            overlap = turn % 2 == 1
            least[overlap] = min(least[overlap], seconds(model, arguments.work / "out", target, options, overlap))
        print(f"| {name} | {least[False]:.1f} s | {least[True]:.1f} s | {least[True] / least[False]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
