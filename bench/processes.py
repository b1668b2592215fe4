"""Runs quantize in 1, 2 and 4 processes: compares bytes and seconds, and resumes after a process was killed.

    python bench/processes.py MODEL --work FOLDER [--counts 1 2 4] [--threads 1] -- --target gguf:Q2_K --samples 8 ...

The arguments after `--` go to `lqexport quantize`. Each count runs once undisturbed, under torchrun if it is more than
one. --threads is the number of threads per process. Then one process of a run with the largest count is killed when
half of the tensors are finished, and the same command resumes the run. Prints JSON. Exits with 1 if a byte differs. The
seconds are those of the whole run, start included; of the stage that solves the linears, with its passes; and the sum
over all linears of solving each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from common import digests, solving_seconds, split_arguments
from stages import timed


def command(count: int, model: str, out: Path, options: list[str]) -> list[str]:
    """Returns the command line of `quantize` in `count` processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    return [sys.executable, *several, "-m", "lqexport", "quantize", model, str(out), "--device", "cpu", *options]


def run_and_kill(arguments: list[str], out: Path, finished: int, environment: dict[str, str]) -> None:
    """Starts the command, and kills its last process as soon as `finished` tensors are written."""
    running = subprocess.Popen(arguments, stdout=sys.stderr, env=environment)
    while running.poll() is None and len(list((out / "tensors").glob("*.safetensors"))) < finished:
        time.sleep(0.01)
    psutil.Process(running.pid).children()[-1].kill()
    running.wait()


def seconds_of(arguments: list[str], out: Path, environment: dict[str, str]) -> dict[str, float]:
    """Runs the command to its end. Returns the seconds of the run, the stage and solving."""
    ran = timed(arguments, environment)
    solving = solving_seconds(out)
    return {"whole": round(ran.seconds, 1), "stage": round(ran.stages["Quantizing"], 1), "solving": round(solving, 1)}


def compared(model: str, work: Path, counts: list[int], threads: int, options: list[str]) -> dict[str, Any]:
    """Returns the seconds of each count, what the kill left, and whether all artifacts are identical."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    seconds, artifacts = {}, []
    for count in counts:
        out = work / str(count)
        seconds[count] = seconds_of(command(count, model, out, options), out, environment)
        artifacts.append(digests(out))
    most, killed = max(counts), work / "killed"
    again = command(most, model, killed, options)
    run_and_kill(again, killed, len(list((work / str(most) / "tensors").iterdir())) // 2, environment)
    left = len(list((killed / "tensors").glob("*.safetensors")))
    whole = (killed / "manifest.json").is_file()
    timed(again, environment)
    artifacts.append(digests(killed))
    identical = all(artifact == artifacts[0] for artifact in artifacts)
    return {"seconds": seconds, "finished_at_the_kill": left, "killed_in_time": not whole, "identical": identical}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1)
    given, options = split_arguments(parser)
    result = compared(given.model, given.work, given.counts, given.threads, options)
    print(json.dumps(result, indent=1))
    sys.exit(not (result["identical"] and result["killed_in_time"]))


if __name__ == "__main__":
    main()
