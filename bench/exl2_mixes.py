"""Measures what mixes of widths gain, by the options that a run with the target exl2 measured.

    python bench/exl2_mixes.py OUT

The first table has, for each pure width, the loss of the best mix of no more bytes divided by the loss of the pure
width, as geometric means by role of the linear. The second table has the sum of losses if all linears together take as
many bytes as that width everywhere. `lqexport.pipeline.allocate` allocates them, from pure widths alone and from all
mixes. Nothing is solved. Prints Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from lqexport.formats.exl2 import runs_named
from lqexport.pipeline import measured_losses as measured
from lqexport.pipeline.allocate import Option, allocate
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import read_json
from lqexport.verification.roles import role_of

WIDTHS = (2, 3, 4, 5, 6)


def pure(options: list[Option], bits: int) -> Option:
    """Returns the option whose codes all have `bits` bits."""
    return next(option for option in options if [run.bits for run in runs_named(option.name)] == [bits])


def saved(options: list[Option], bits: int) -> float:
    """Returns the loss of the best option of no more bytes, divided by the loss of the pure width."""
    even = pure(options, bits)
    return min(option.loss for option in options if option.nbytes <= even.nbytes) / even.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    artifact = Artifact(parser.parse_args().artifact)
    losses = read_json(artifact.folder / "mixes.json", f"{artifact.folder} is not an artifact for EXL2.")
    options = {name: measured.options(mixes, artifact.read(name).shape) for name, mixes in losses.items()}
    roles: dict[str, list[list[Option]]] = {}
    for name, tried in options.items():
        roles.setdefault(role_of(name), []).append(tried)
    print(f"| linear | {' | '.join(f'{bits} bits' for bits in WIDTHS)} |\n|---|{'---|' * len(WIDTHS)}")
    for role, members in roles.items():
        ratios = [np.exp(np.mean([np.log(saved(tried, bits)) for tried in members])) for bits in WIDTHS]
        print(f"| {role} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    print("\n| bytes of | even | allocated, pure widths | allocated, all mixes |\n|---|---|---|---|")
    for bits in WIDTHS:
        even = [pure(tried, bits) for tried in options.values()]
        budget, alone = sum(option.nbytes for option in even), sum(option.loss for option in even)
        widths = {name: [pure(tried, width) for width in (*WIDTHS, 8)] for name, tried in options.items()}
        row = alone, allocate(widths, budget).loss, allocate(options, budget).loss
        print(f"| {bits} bits | {' | '.join(f'{value:.4f}' for value in row)} |")


if __name__ == "__main__":
    main()
