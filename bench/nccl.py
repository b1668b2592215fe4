"""Runs quantize in a group of one process over NCCL, and each exchange between processes once.

    torchrun --standalone --nproc-per-node 1 bench/nccl.py MODEL --work FOLDER -- --target gguf:Q4_K ...

The arguments after `--` go to `quantize`, which also runs without a group. Prints JSON. Exits with 1 if a byte differs
or an exchange does not return what it was given. NCCL does not allow two processes on one GPU, so on one GPU no process
sends to another: this test only shows that the calls work.
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
    """Quantizes in this process. Returns the digests of the artifact."""
    if status := app(["quantize", model, str(out), "--device", "cuda", *options], standalone_mode=False):
        sys.exit(f"quantize ended with exit status {status}.")
    return digests(out)


def exchanged() -> bool:
    """Returns whether NCCL gives back what it is given.

    The processes are told that there are two of them, since a single process exchanges nothing.
    """
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
