"""What quantizing costs: time and peak memory of whole processes, beside bare forward passes over the same tokens.

    python bench/cost.py MODEL --text FILE --work FOLDER [--target gguf:Q4_K] [--samples 64] [--sequence-length 512]

The floor is transformers' own forward over the calibration sequences (decoder blocks, no head, float32), in its own
process; the best batch size of 1, 2 and 4 counts. Then `lqexport quantize` runs with one pass of the solver, and by its
defaults (asymmetric, descent, tuning); and, under guided moments at hand, with error feedback alone and with
descent, whose difference is the solver's. All on this machine, one after the other; prints JSON. Processor seconds
are of all threads and hold on a busy machine, too.
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
"""Error feedback alone, under second moments that one forward pass gives; the defaults; then, under the same guided
second moments, the solver without and with its refinement."""
CACHED = ("filling_the_cache", "feedback_alone", "with_descent")

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
    """Wall seconds, processor seconds and peak resident memory in GiB of a command and its children."""
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
    sizes = [str(samples), str(length)]
    floor = subprocess.run(
        [sys.executable, "-c", FLOOR, model, text, *sizes], check=True, stdout=subprocess.PIPE, text=True
    )
    result = {"floor": json.loads(floor.stdout.splitlines()[-1])}
    options = ["--target", target, "--calibration", text, "--samples", sizes[0], "--sequence-length", sizes[1]]
    defaults = ["--tune", str(min(samples, 64))]  # in proportion, where there are fewer sequences than by default
    for name, more in RUNS.items():
        cache = ["--cache", str(work / "cache")] if name in CACHED else []
        command = [sys.executable, "-m", "lqexport", "quantize", model, str(work / name), *options]
        command += [*(more or defaults), *cache]
        result[name] = run_measured(command)
        result[f"{name}_to_floor"] = _ratio(result, name, "floor")
    result["quantize_to_one_pass"] = _ratio(result, "quantize", "one_pass")
    result["with_descent_to_feedback_alone"] = _ratio(result, "with_descent", "feedback_alone")
    return {"model": model, "target": target, "samples": samples, "sequence_length": length, **result}


def _ratio(result: dict[str, Any], name: str, other: str) -> float:
    return float(result[name]["processor_seconds"] / result[other]["processor_seconds"])


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
