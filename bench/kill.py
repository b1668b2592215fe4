"""kill -9 at random moments, then resume: is the artifact byte-identical to one made in one go?

    python bench/kill.py MODEL --work FOLDER [--kills 10] [--seed 0] -- --target gguf:Q2_K --samples 8 ...

What follows `--` goes to `lqexport quantize`. Prints a line per kill and exits with 1 where a byte differs.
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
    """Run once undisturbed and time it; then run and kill until `kills` have hit an unfinished run, each life going on
    from the one before; finish, and compare all files. A run that finished before its kill is compared and begun anew.
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
    """Start the command, and kill it after `seconds` if it still runs."""
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
