"""Compares lqexport with other quantizers: the same model, the same calibration tokens, each in a process of its own.

    python bench/peers.py MODEL --calibration FILE --evaluation FILE [FILE ...] --work FOLDER [--samples 64]
        [--autoround PYTHON] [--gptqmodel PYTHON] [--only NAME ...]

AutoRound and GPTQModel come from PyPI and want environments of their own: PYTHON is the interpreter of one. What is
left out here is left out of the table. Every process has one thread. Processor seconds are user and system time of the
whole process, imports and reading included; the column "passes" has them in bare forward passes over the calibration
tokens. GGUF files run in llama.cpp, folders in GPTQ's layout by lqexport's own forward pass. Models that FOLDER holds
are not made again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import taken_by
from judging import Judge
from peers_make import MAKERS

from lqexport.calibration.sequences import load_calibration
from lqexport.evaluation.evaluate import Evaluation
from lqexport.models.source import open_source
from lqexport.verification.comparison import compare

BARE = "bare forward passes"
# GPTQModel does not start with fewer workers.
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "GPTQMODEL_CPU_WORKERS": "2"
}


def interpreter(name: str, arguments: argparse.Namespace) -> str | None:
    """Returns the Python that has the tool; None if it was not given."""
    if name.startswith("AutoRound"):
        return arguments.autoround
    return arguments.gptqmodel if name == "GPTQModel" else sys.executable


def made(name: str, python: str, model: str, work: Path) -> dict[str, Any]:
    """Makes a model, unless the folder has its record. Returns the process's seconds and its peak memory in bytes."""
    slug = name.lower().replace("'", "").replace(",", "").replace(" ", "-")
    out = work / (slug if "gptq" in slug else f"{slug}.gguf")
    record = work / f"{slug}.json"
    if not record.is_file():
        maker = str(Path(__file__).with_name("peers_make.py"))
        command = [python, maker, name, model, str(work / "tokens.npy"), str(out)]
        taken = taken_by(command, work / f"{slug}.log", os.environ | ENVIRONMENT)
        facts = taken._asdict() | {"file": str(out)}
        record.write_text(json.dumps(facts))
    return json.loads(record.read_text())


def losses(file: Path, model: str, text: str, windows: int) -> Evaluation:
    """Returns how far a model is from its source on a text."""
    if file.is_file():
        (compared,) = compare([file], model, text=text, windows=windows, engine="llama.cpp", device="cpu").files
        return compared.evaluation
    return Judge(open_source(model), text, windows)(open_source(str(file)))


def measured(file: Path, model: str, texts: list[str], windows: int) -> list[str]:
    """Returns the cells of size, and of KL, perplexity and same top token on every text."""
    parts = [file] if file.is_file() else list(file.glob("*.safetensors"))
    cells = [f"{sum(part.stat().st_size for part in parts) / 1e6:.1f}"]
    for text in texts:
        loss = losses(file, model, text, windows)
        cells += [f"{loss.kl:.4f} ± {loss.kl_error:.4f}", f"{loss.perplexity:.3f}", f"{loss.top1:.1%}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--autoround", help="the Python of an environment with auto-round")
    parser.add_argument("--gptqmodel", help="the Python of an environment with gptqmodel")
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    shutil.copy(arguments.calibration, work / "calibration.txt")
    tokenizer = open_source(arguments.model).tokenizer()
    sequences = load_calibration(
        str(work / "calibration.txt"), tokenizer, samples=arguments.samples, sequence_length=512, seed=0
    )
    np.save(work / "tokens.npy", sequences.tokens.numpy())
    floor = made(BARE, sys.executable, arguments.model, work)["seconds"]
    heads = [f"{title}, {Path(text).stem}" for text in arguments.evaluation for title in ("KL", "perplexity", "top-1")]
    print(f"{arguments.samples} x 512 tokens; the bare passes take {floor:.0f} processor seconds\n")
    print(f"| tool | processor seconds | passes | peak memory, GB | MB | {' | '.join(heads)} |")
    print(f"|{'---|' * (5 + len(heads))}")
    for name in arguments.only:
        python = interpreter(name, arguments)
        if name == BARE or python is None:
            continue
        facts = made(name, python, arguments.model, work)
        cells = measured(Path(facts["file"]), arguments.model, arguments.evaluation, arguments.windows)
        costs = [f"{facts['seconds']:.0f}", f"{facts['seconds'] / floor:.1f}", f"{facts['peak'] / 1e9:.1f}"]
        print(f"| {' | '.join([name, *costs, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
