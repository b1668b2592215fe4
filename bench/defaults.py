"""Compares lqexport's files by default with llama-quantize's of the same mixes, on texts of several sorts.

    python bench/defaults.py MODEL --mixes Q4_K_M Q2_K_M --evaluation FILE [FILE ...] --work FOLDER [--windows 12]
        [--samples 64] [-- OPTION ...]

Mixes have lqexport's names: Q2_K_M is what llama.cpp calls Q2_K. Both tools calibrate on the text that lqexport takes
by default, on SAMPLES x 512 tokens: llama-quantize by an importance matrix. The options behind `--` go to `lqexport
quantize`; without any, its files are by default in all else. llama.cpp judges all files. Files that FOLDER holds are
not made again. Prints Markdown: mean KL from the source, and lqexport's part of llama-quantize's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from common import solved, split_arguments

from lqexport.evaluation import llamacpp_quantizer
from lqexport.verification.comparison import compare

CALLED_LIKE_TYPES = {"Q2_K_M": "Q2_K", "Q6_K_M": "Q6_K"}
"""Mix -> llama-quantize's name of it, which is that of a type."""


def by_llama_quantize(model: str, mix: str, calibration: list[str], work: Path) -> Path:
    """Makes a GGUF file by llama.cpp's quantizer with an importance matrix, if it is missing."""
    file, matrix = work / f"llama-quantize-{mix}.gguf", work / "imatrix.gguf"
    half = solved(model, work / "F16.gguf", "to-gguf", ["--target", "gguf:F16"])
    if not matrix.exists():
        subprocess.run([sys.executable, "-m", "lqexport", "imatrix", model, str(matrix), *calibration], check=True)
    if not file.exists():
        llamacpp_quantizer.quantize(half, file, CALLED_LIKE_TYPES.get(mix, mix), imatrix=matrix)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--mixes", nargs="+", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--samples", default="64", help="calibration sequences of both tools")
    arguments, options = split_arguments(parser)
    work: Path = arguments.work
    calibration = ["--samples", arguments.samples]
    work.mkdir(parents=True, exist_ok=True)
    print("| mix | MB | text | llama-quantize, imatrix | lqexport | ratio |\n|---|---|---|---|---|---|")
    for mix in arguments.mixes:
        chosen = ["--target", f"gguf:{mix}", *calibration, *options]
        files = [
            by_llama_quantize(arguments.model, mix, calibration, work),
            solved(arguments.model, work / f"lqexport-{mix}.gguf", "to-gguf", chosen),
        ]
        size = " / ".join(f"{file.stat().st_size / 1e6:.1f}" for file in files)
        for text in arguments.evaluation:
            compared = compare(
                files, arguments.model, text=text, windows=arguments.windows, engine="llama.cpp", device="cpu"
            )
            theirs, ours = (entry.evaluation for entry in compared.files)
            cells = [f"{loss.kl:.4f} ± {loss.kl_error:.4f}" for loss in (theirs, ours)]
            print(
                f"| {mix} | {size} | {Path(text).stem} | {' | '.join(cells)} | {ours.kl / theirs.kl:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
