"""Quantizes a model to 3-bit tables, writes a folder that transformers loads, and verifies it, with a progress line.

python examples/quantize.py ./SmolLM2-135M ./SmolLM2-135M-3bit
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lqexport


def show(stage: str, share: float) -> None:
    """Prints the progress over the line printed before."""
    print(f"\r{stage:<40} {share:4.0%}", end="", file=sys.stderr, flush=True)


def run(source: str, folder: Path, **options: Any) -> lqexport.Verification:
    """Quantizes `source` by a recipe with `options`, writes the result as `folder`, and returns its verification."""
    recipe = lqexport.Recipe(source, "native:table-3", **options)
    artifact = folder.with_name(f"{folder.name}-artifact")
    listener = lqexport.Callback(show, print)
    lqexport.quantize(recipe, artifact, listener=listener)
    lqexport.export(artifact, folder)
    return lqexport.verify(folder, source, windows=4, listener=listener)


if __name__ == "__main__":
    result = run(sys.argv[1], Path(sys.argv[2]))
    evaluation = result.evaluations[0]
    print(
        f"\n{result.bits_per_weight:.2f} bits per weight, KL {evaluation.kl:.4f}, same top token {evaluation.top1:.1%}"
    )
    sys.exit("\n".join(result.failed))
