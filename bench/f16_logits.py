"""Compares the logits of a model's F16 export in llama.cpp with those of transformers in float32.

    python bench/f16_logits.py MODEL [MODEL ...] --evaluation FILE --work FOLDER [--tokens 512]

Prints for each model the mean and the largest absolute difference, and how often both rank the same token first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lqexport.calibration import texts
from lqexport.converters.gguf import writer as gguf
from lqexport.evaluation import llamacpp
from lqexport.evaluation.protocols import tokenize
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact


def compare(model: str, text: str, work: Path, count: int) -> tuple[float, float, float]:
    """Returns the mean and the largest absolute difference of the logits, and the share of equal first choices."""
    out = work / Path(model).name
    quantize(Recipe(model, "gguf:F16", method="rtn"), out)
    gguf.write(Artifact(out), out.with_suffix(".gguf"))
    tokens = tokenize(AutoTokenizer.from_pretrained(model), texts.read_text(text).content)[:count]
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(torch.tensor(tokens)[None]).logits[
            0
        ]
    with llamacpp.LlamaCpp(out.with_suffix(".gguf"), count) as engine:
        test = torch.from_numpy(engine.logits(tokens.tolist()))
    difference = (test - reference).abs()
    same = (test.argmax(1) == reference.argmax(1)).float().mean()
    return float(difference.mean()), float(difference.max()), float(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--evaluation", default="python-heldout")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    print("| model | mean difference | largest | same top-1 |\n|---|---|---|---|")
    for model in arguments.models:
        mean, most, same = compare(model, arguments.evaluation, arguments.work, arguments.tokens)
        print(f"| {Path(model).name} | {mean:.5f} | {most:.4f} | {same:.1%} |", flush=True)


if __name__ == "__main__":
    main()
