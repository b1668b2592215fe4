"""A run in a group of one process over NCCL, and each of our exchanges once: one GPU shows no more than that they work.

    torchrun --standalone --nproc-per-node 1 bench/nccl.py MODEL --work FOLDER -- --target gguf:Q4_K ...

What follows `--` goes to `quantize`, which runs alone too. Prints JSON, and exits with 1 where a byte differs or an
exchange gives back something else than it was given. NCCL has no two processes on one GPU, so none sends to another.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from common import digests, split_arguments
from torch import distributed

from lqexport.cli.app import app
from lqexport.runtime.processes import PATIENCE, Processes


def run(model: str, out: Path, options: list[str]) -> dict[str, str]:
    """Quantize in this process; the digests of what came out."""
    if status := app(["quantize", model, str(out), "--device", "cuda", *options], standalone_mode=False):
        sys.exit(f"quantize ended with exit status {status}.")
    return digests(out)


def exchanged() -> bool:
    """Whether what goes through NCCL comes back. Called as if there were two, since alone nothing is exchanged."""
    processes, tensor = Processes(0, 2), torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    processes.wait()
    agreed = processes.from_first({"any": ["thing"]}) == {"any": ["thing"]}
    return agreed and torch.equal(processes.maximum(tensor.clone()), tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    given, options = split_arguments(parser)
    alone = run(given.model, given.work / "alone", options)
    torch.cuda.set_device(0)
    distributed.init_process_group("nccl", timeout=PATIENCE)
    grouped, works = run(given.model, given.work / "nccl", options), exchanged()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    distributed.destroy_process_group()
    print(json.dumps({"nccl": version, "exchanges": works, "identical": alone == grouped}))
    sys.exit(not (works and alone == grouped))


if __name__ == "__main__":
    main()
