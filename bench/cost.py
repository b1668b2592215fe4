"""Measures what quantizing costs: time and peak memory of whole processes, beside bare forward passes.

The forward passes are over the same tokens.

    python bench/cost.py MODEL --text FILE --work FOLDER [--target gguf:Q4_K] [--samples 64] [--sequence-length 512]

The floor is transformers' own forward pass over the calibration sequences (decoder blocks, no head, float32) in its own
process, with the fastest batch size of 1, 2 and 4. Then `lqexport quantize` runs with one pass of the solver, and with
its defaults (asymmetric, descent, tuning). Last, with guided moments from the cache, it runs with error feedback alone
and with descent; the difference is the cost of descent. All runs are on this machine, one after the other. Prints JSON.
Processor seconds count all threads, so they are valid on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNS = {
    "one_pass": ["--prefix", "full", "--moments", "normalized", "--descent", "0", "--tune", "0"],
    "quantize": [],
    "filling_the_cache": ["--prefix", "full", "--method", "gptq", "--descent", "0", "--tune", "0"],
    "feedback_alone": ["--prefix", "full", "--descent", "0", "--tune", "0"],
    "with_descent": ["--prefix", "full", "--tune", "0"],
}
"""The options of each run of `quantize`; an empty list means the defaults.

`one_pass` is error feedback alone with second moments from one forward pass. `feedback_alone` and `with_descent` use
the same guided second moments, which `filling_the_cache` has computed."""
CACHED = ("filling_the_cache", "feedback_alone", "with_descent")
"""The runs that share a cache of second moments."""

FLOOR = """
import json, resource, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from lqexport.calibration.sequences import load_calibration
model, text, samples, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(model)
tokens = load_calibration(text, tokenizer, samples=samples, sequence_length=length, seed=0).tokens
body = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().model
def seconds(part, batch):
    began = time.perf_counter()
    for ids in part.split(batch):
        body(ids, use_cache=False)
    return time.perf_counter() - began
with torch.no_grad():
    body(tokens[:1], use_cache=False)
    batch = min((1, 2, 4), key=lambda size: seconds(tokens[:4], size))
    processor = time.process_time()
    total = seconds(tokens, batch)
    processor = time.process_time() - processor
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": total, "processor_seconds": processor, "batch": batch, "peak_gib": peak}))
"""


def run_measured(command: list[str]) -> dict[str, float]:
    """Runs a command. Returns wall seconds, processor seconds and peak resident memory in GiB, with its children's."""
    code = (
        "import json, resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode;"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "found = {'processor_seconds': used.ru_utime + used.ru_stime, 'peak_gib': used.ru_maxrss / 2**20};"
        "print(json.dumps(found)); sys.exit(status)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1])}


def measure(model: str, text: str, work: Path, target: str, samples: int, length: int) -> dict[str, Any]:
    """Runs the floor and every run. Returns their figures and ratios."""
    sizes = [str(samples), str(length)]
    floor = subprocess.run(
        [sys.executable, "-c", FLOOR, model, text, *sizes], check=True, stdout=subprocess.PIPE, text=True
    )
    result = {"floor": json.loads(floor.stdout.splitlines()[-1])}
    options = ["--target", target, "--calibration", text, "--samples", sizes[0], "--sequence-length", sizes[1]]
    defaults = ["--tune", str(min(samples, 64))]  # fewer tuning steps if there are fewer sequences than by default
    for name, more in RUNS.items():
        cache = ["--cache", str(work / "cache")] if name in CACHED else []
        command = [sys.executable, "-m", "lqexport", "quantize", model, str(work / name), *options]
        command += [*(more or defaults), *cache]
        result[name] = run_measured(command)
        result[f"{name}_to_floor"] = _ratio(result, name, "floor")
    result["quantize_to_one_pass"] = _ratio(result, "quantize", "one_pass")
    result["with_descent_to_feedback_alone"] = _ratio(result, "with_descent", "feedback_alone")
    return {"model": model, "target": target, "samples": samples, "sequence_length": length, **result}


def _ratio(result: dict[str, Any], name: str, base: str) -> float:
    return float(result[name]["processor_seconds"] / result[base]["processor_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--target", default="gguf:Q4_K")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()
    result = measure(
        arguments.model, arguments.text, arguments.work, arguments.target, arguments.samples, arguments.sequence_length
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
