"""Times the search of EXL3's walks on one core, and computes from it what a model takes.

    python bench/exl3_speed.py [--tiles 200] [--weights 6.98e9 68.5e9]

A row has K, the milliseconds of one core for a tile of 256 weights in error feedback and in a sweep, and the hours of
one core for models of so many weights in their blocks: by default, which makes no sweep, and with `--effort best`,
which makes two. The milliseconds are measured, the hours are computed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time

import numba
import numpy as np

from lqexport.converters.exl3.plan import WIDTHS
from lqexport.formats.exl3 import EXL3
from lqexport.formats.trellis import POSITIONS
from lqexport.kernels import trellis
from lqexport.recipe import WALK_SWEEPS
from lqexport.solver.solve_trellis import SEAMS


def milliseconds(name: str, tiles: int) -> tuple[float, float]:
    """Returns the milliseconds of one core for a tile: of a first search, and of one in a sweep."""
    codec_trellis = EXL3[name].trellis
    form = trellis.form_of(codec_trellis.table, codec_trellis.new_bits)
    targets = np.random.default_rng(0).normal(0, codec_trellis.table.std(), (tiles, POSITIONS)).astype(np.float32)
    weights, states, rooms = (
        np.ones(POSITIONS, np.float32),
        np.empty((tiles, POSITIONS), np.uint16),
        trellis.rooms_for(form, 1),
    )
    trellis.search(targets[:1], weights, form, 0, False, rooms, states[:1])  # compiles
    times = []
    for begin, again in ((0, False), (SEAMS[0], True)):
        began = time.process_time()
        trellis.search(targets, weights, form, begin, again, rooms, states)
        times.append(1000 * (time.process_time() - began) / tiles)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=200)
    parser.add_argument("--weights", type=float, nargs="+", default=[6.98e9, 68.5e9])
    arguments = parser.parse_args()
    numba.set_num_threads(1)
    hours = " | ".join(f"hours of a core, {weights:.3g} weights, default | best" for weights in arguments.weights)
    print(f"| K | ms a tile | in a sweep | {hours} |\n|---|---|---|{'---|---|' * len(arguments.weights)}")
    for width, name in WIDTHS.items():
        first, again = milliseconds(name, arguments.tiles)
        cells = []
        for weights in arguments.weights:
            for sweeps in (WALK_SWEEPS["default"], WALK_SWEEPS["best"]):
                cells.append(f"{(first + sweeps * again) * weights / POSITIONS / 3.6e6:.0f}")
        print(f"| {width:g} | {first:.2f} | {again:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
