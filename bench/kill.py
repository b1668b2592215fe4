"""Kills runs at random moments (kill -9), resumes them, and checks that the artifact is that of an undisturbed run.

    python bench/kill.py MODEL --work FOLDER [--kills 10] [--seed 0] -- --target gguf:Q2_K --samples 8 ...

The arguments after `--` go to `lqexport quantize`. Prints a line per kill. Exits with 1 if a byte differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import digests, split_arguments


def kill_and_resume(model: str, work: Path, options: list[str], *, kills: int, seed: int) -> dict[str, Any]:
    """Kills and resumes a run until `kills` kills have hit an unfinished run, finishes it, and compares all files.

    A first undisturbed run gives the expected files and the time within which kills are drawn. A run that finished
    before its kill is compared, deleted and started again. Returns the seconds of the undisturbed run, the number of
    finished tensors at each kill, and whether all files are identical.
    """
    whole, killed = work / "whole", work / "killed"
    began = time.monotonic()
    subprocess.run(_command(model, whole, options), check=True)
    seconds = time.monotonic() - began
    draw = random.Random(seed)
    finished: list[int] = []
    identical = True
    while len(finished) < kills:
        moment = draw.uniform(0, seconds)
        _run_until(_command(model, killed, options), moment)
        if (killed / "manifest.json").is_file():
            identical &= digests(whole) == digests(killed)
            shutil.rmtree(killed)
            continue
        finished.append(len(list((killed / "tensors").glob("*.safetensors"))))
        print(f"killed after {moment:.1f} s with {finished[-1]} tensors finished", flush=True)
    subprocess.run(_command(model, killed, options), check=True)
    identical &= digests(whole) == digests(killed)
    return {"seconds": seconds, "finished_at_kills": finished, "identical": identical}


def _command(model: str, out: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "lqexport", "quantize", model, str(out), *options]


def _run_until(command: list[str], seconds: float) -> None:
    """Starts the command, and kills it after `seconds` if it still runs."""
    process = subprocess.Popen(command)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments, options = split_arguments(parser)
    result = kill_and_resume(arguments.model, arguments.work, options, kills=arguments.kills, seed=arguments.seed)
    print(json.dumps(result))
    sys.exit(0 if result["identical"] else 1)


if __name__ == "__main__":
    main()
