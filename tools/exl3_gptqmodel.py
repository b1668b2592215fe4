"""Compares an EXL3 folder as GPTQModel's torch decoder reads it with what this program decodes.

    python tools/exl3_gptqmodel.py FOLDER PYTHON

PYTHON is the interpreter of an environment with GPTQModel, where this file runs again without lqexport. It prints the
number of linears and the largest relative root mean square of a difference between their weights. GPTQModel skips the
roundings to float16 within a layer, so about 4e-4 is expected.

GPTQModel reads matrices whose sides are multiples of 128, with whole K.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of the linears of a folder, by the name of the module, as this program decodes them."""
    from lqexport.models.written import open_export

    model = open_export(folder)
    names = [name for name in model.names() if model.planes(name)[0].startswith("exl3:")]
    return {name.removesuffix(".weight"): model.read(name) for name in names}


def compare(folder: str, weights: str) -> None:
    """Prints how GPTQModel's weights differ from those in a safetensors file."""
    from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]

    model = GPTQModel.load(folder, backend=BACKEND.EXL3_TORCH, device="cpu", dtype=torch.float16).model
    largest = 0.0
    for name, ours in load_file(weights).items():
        theirs = model.get_submodule(name).get_weight_tensor(dtype=torch.float32).T
        largest = max(largest, float((theirs - ours).norm() / ours.norm()))
    print(f"{len(load_file(weights))} linears, largest relative difference {largest:.2g}")


def main(folder: str, python: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        weights = str(Path(work) / "weights.safetensors")
        save_file({name: weight.contiguous() for name, weight in decoded(Path(folder)).items()}, weights)
        subprocess.run([python, __file__, folder, weights, "child"], check=True)


if __name__ == "__main__":
    if sys.argv[-1] == "child":
        compare(*sys.argv[1:3])
    else:
        main(*sys.argv[1:])
