"""Compares GGUF types by what error feedback loses in two linears of a model's first block, in many rows and in few.

    python bench/type_losses.py MODEL [--rows 256 64]

MODEL is a folder of bench/reference_models.py, such as smollm2-k. Second moments are of 1024 tokens of python-docs. The
loss of each type is printed as a multiple of Q4_K's, Q3_K's or Q2_K's on the same rows, and the processor seconds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from lqexport.calibration.collect import by_weight, forward_moments
from lqexport.calibration.texts import read_text
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.measured_losses import sampled_rows
from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear

LINEARS = ("self_attn.q_proj", "mlp.down_proj")
TYPES = {
    "Q2_K": ("Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "Q1_0"),
    "Q3_K": ("Q3_K", "IQ3_S", "IQ3_XXS"),
    "Q4_K": ("Q4_K", "IQ4_XS", "IQ4_NL", "MXFP4", "NVFP4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 64])
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    tokens = source.tokenizer()(read_text("python-docs").content[:20000], return_tensors="pt")["input_ids"][:, :1024]
    model = BlockModel(source, torch.device("cpu"))
    with torch.no_grad():
        (moments,) = forward_moments(model, tokens, "normalized", wanted=lambda _, group: group[0] in LINEARS, last=0)
    hessians, settings = by_weight(model, moments), replace(Recipe("model", "gguf:Q4_K").solver_settings, descent=0)
    for name in (model.weight_name(0, linear) for linear in LINEARS):
        weight = source.read(name).float()
        for count in arguments.rows:
            rows = sampled_rows(sampled_rows(weight), count)
            for relative, types in TYPES.items():
                first = None
                for gguf_type in types:
                    start = time.process_time()
                    loss = solve_linear(name, rows, hessians[name], f"gguf:{gguf_type}", settings).facts["loss"]
                    first = first or loss
                    seconds = time.process_time() - start
                    print(f"{name} {len(rows)} {gguf_type:8} {loss / first:.4f} of {relative}, {seconds:.2f} s")


if __name__ == "__main__":
    main()
