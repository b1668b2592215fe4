"""Processor seconds of a ladder beside those of its files made one by one.

    python bench/ladder_time.py MODEL --work FOLDER [--targets Q2_K_M,Q4_K_M,Q6_K] [-- OPTIONS OF lqexport ladder]

Both make, write and verify the same files; each command is a process of its own, whose user and system time counts,
imports included. Checks that the files have the same bytes. FOLDER is emptied first. Prints Markdown.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
from pathlib import Path

from common import split_arguments, taken_by


def seconds_of(arguments: list[str], log: Path) -> float:
    """Returns the processor seconds of an lqexport command."""
    return taken_by([sys.executable, "-m", "lqexport", *arguments], log).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", default="Q2_K_M,Q4_K_M,Q6_K")
    arguments, options = split_arguments(parser)
    work: Path = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log = work / "log"
    ladder = work / "ladder"
    together = seconds_of(["ladder", arguments.model, str(ladder), "--targets", arguments.targets, *options], log)
    print("| command | processor seconds |\n|---|---|")
    alone = 0.0
    for target in arguments.targets.split(","):
        file = work / f"{target}.gguf"
        seconds = seconds_of(["export", arguments.model, str(file), "--target", f"gguf:{target}", *options], log)
        (shared,) = ladder.glob(f"*-{target}.gguf")
        if not filecmp.cmp(shared, file, shallow=False):
            raise SystemExit(f"{shared} and {file} differ.")
        print(f"| `export`, {target} | {seconds:.0f} |", flush=True)
        alone += seconds
    print(f"| all of them | {alone:.0f} |\n| `ladder` | {together:.0f} |")


if __name__ == "__main__":
    main()
