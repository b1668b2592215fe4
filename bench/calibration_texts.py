"""Compares texts to calibrate on: what files from each lose on texts of several sorts, judged in llama.cpp.

    python bench/calibration_texts.py MODEL --texts general python-docs FILE --targets gguf:Q2_K gguf:Q4_K
        --evaluation FILE [FILE ...] --work FOLDER [--windows 12] [-- OPTION ...]

Each text is a name or a file that `quantize --calibration` takes; the options behind `--` go to `quantize`. Files that
FOLDER holds are not made again. Prints Markdown: mean KL from the source over windows of 512 tokens of each evaluation
text, and the largest of them, by which a default is judged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import solved, split_arguments

from lqexport.evaluation.evaluate import Evaluation
from lqexport.verification.comparison import compare


def made(model: str, target: str, text: str, work: Path, options: list[str]) -> Path:
    """Returns a GGUF file of a model that was calibrated on a text, and makes it if it is missing."""
    file = work / f"{target.partition(':')[2]}-{Path(text).stem}.gguf"
    return solved(model, file, "to-gguf", ["--target", target, "--calibration", text, *options])


def losses(files: list[Path], model: str, text: str, windows: int) -> list[Evaluation]:
    """Returns how far each file is from its source on an evaluation text."""
    compared = compare(files, model, text=text, windows=windows, engine="llama.cpp", device="cpu")
    return [entry.evaluation for entry in compared.files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    arguments, options = split_arguments(parser)
    arguments.work.mkdir(parents=True, exist_ok=True)
    titles = [Path(text).stem for text in arguments.evaluation]
    print(f"| target | calibration text | {' | '.join(titles)} | largest |\n|{'---|' * (3 + len(titles))}")
    for target in arguments.targets:
        files = [made(arguments.model, target, text, arguments.work, options) for text in arguments.texts]
        columns = [losses(files, arguments.model, text, arguments.windows) for text in arguments.evaluation]
        for text, row in zip(arguments.texts, zip(*columns, strict=True), strict=True):
            cells = [f"{loss.kl:.4f} ± {loss.kl_error:.4f}" for loss in row]
            largest = max(loss.kl for loss in row)
            print(f"| {target} | {Path(text).stem} | {' | '.join(cells)} | {largest:.4f} |", flush=True)


if __name__ == "__main__":
    main()
