"""Prints what a search of EXL3's trellis leaves of Gaussian weights: `DISTORTION` of formats/trellis.py.

    python bench/exl3_distortion.py [--tiles 128]

A line has K, the mean squared error of weights of unit variance at the best of some scales, that scale over the
standard deviation of the codebook's values, and the error over 4^-K, the least that any code of K bits can leave.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from lqexport.converters.exl3.plan import WIDTHS
from lqexport.formats.exl3 import EXL3
from lqexport.formats.trellis import POSITIONS, SIDE
from lqexport.solver.solve_trellis import Encoder

SCALES = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)


def distortion(name: str, tiles: int) -> tuple[float, float]:
    """Returns the least mean squared error over the scales, and its scale."""
    trellis = EXL3[name].trellis
    encoder, deviation = Encoder(trellis), float(trellis.table.std())
    weights = torch.randn(SIDE, SIDE * tiles, generator=torch.Generator().manual_seed(0))
    weights /= weights.std()
    states = np.empty((tiles, POSITIONS), np.uint16)
    errors = {}
    for scale in SCALES:
        factor = scale * deviation
        values = encoder.nearest(weights * factor, torch.ones(SIDE), states) / factor
        errors[scale] = float((values - weights).square().mean())
    best = min(errors, key=errors.__getitem__)
    return errors[best], best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=128)
    arguments = parser.parse_args()
    for width, name in WIDTHS.items():
        error, scale = distortion(name, arguments.tiles)
        print(f"{width:4g} {error:.3g} at {scale}, {error * 4**width:.3f} of the least", flush=True)


if __name__ == "__main__":
    main()
