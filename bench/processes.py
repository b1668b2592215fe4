"""1, 2 and 4 processes on one run: the same bytes, how much faster, and what a killed one leaves.

    python bench/processes.py MODEL --work FOLDER [--counts 1 2 4] -- --target gguf:Q2_K --samples 8 ...

What follows `--` goes to `lqexport quantize`. Each count runs once undisturbed, under torchrun where it is more than
one; then a run of the largest count loses a process when half of its tensors are there, and the same command goes on.
Prints JSON, and exits with 1 where a byte differs. The seconds are of whole runs, start included.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

digests = runpy.run_path(str(Path(__file__).with_name("kill.py")))["digests"]


def command(count: int, model: str, out: Path, options: list[str]) -> list[str]:
    """`quantize` in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    return [sys.executable, *several, "-m", "lqexport", "quantize", model, str(out), "--device", "cpu", *options]


def run_and_kill(arguments: list[str], out: Path, finished: int) -> None:
    """Start the command, and kill its last process once so many tensors are finished."""
    running = subprocess.Popen(arguments, stdout=sys.stderr)
    while running.poll() is None and len(list((out / "tensors").glob("*.safetensors"))) < finished:
        time.sleep(0.01)
    psutil.Process(running.pid).children()[-1].kill()
    running.wait()


def compared(model: str, work: Path, counts: list[int], options: list[str]) -> dict[str, Any]:
    """Seconds of each count, and whether all artifacts are the same."""
    seconds, found = {}, []
    for count in counts:
        began = time.perf_counter()
        subprocess.run(command(count, model, work / str(count), options), check=True, stdout=sys.stderr)
        seconds[count] = round(time.perf_counter() - began, 1)
        found.append(digests(work / str(count)))
    most, killed = max(counts), work / "killed"
    run_and_kill(
        command(most, model, killed, options), killed, len(list((work / str(most) / "tensors").iterdir())) // 2
    )
    left = len(list((killed / "tensors").glob("*.safetensors")))
    whole = (killed / "manifest.json").is_file()
    subprocess.run(command(most, model, killed, options), check=True, stdout=sys.stderr)
    found.append(digests(killed))
    identical = all(each == found[0] for each in found)
    return {"seconds": seconds, "finished_at_the_kill": left, "killed_in_time": not whole, "identical": identical}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = parser.parse_args(sys.argv[1:split])
    result = compared(given.model, given.work, given.counts, sys.argv[split + 1 :])
    print(json.dumps(result, indent=1))
    sys.exit(not (result["identical"] and result["killed_in_time"]))


if __name__ == "__main__":
    main()
