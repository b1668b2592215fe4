"""Measures ways to quantize an embedding that is also the output, alone, with the rest of the model left as it is.

    python bench/tied_embedding.py MODEL [--target mlx:3-g64] [--shares 0 0.1 1]

The embedding is rounded, or solved as the output under the normalized second moments of the output's inputs, with a
share of the mean of their diagonal added to the diagonal. Prints the mean KL divergence in nats over 4 sequences of 512
tokens, if the quantized matrix is only looked up, only the output, and both.
"""

from __future__ import annotations

import argparse

import torch

from lqexport.calibration.collect import final_states
from lqexport.calibration.sequences import load_calibration
from lqexport.converters.mlx.types import in_dtype, in_half
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.outer_losses import Replaced, divergence, output_moments
from lqexport.recipe import Recipe
from lqexport.solver.linear import solve_linear
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import StoredTensor

SOLVED_ON, MEASURED_ON = 16, 4


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--target", default="mlx:3-g64")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 1])
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    original = BlockModel(source)
    name, codec_name = original.architecture.embedding, in_dtype(arguments.target, in_half(source.config))
    calibration = load_calibration(
        "python-docs", source.tokenizer(), samples=SOLVED_ON + MEASURED_ON, sequence_length=512, seed=0
    )
    held_out = calibration.tokens[SOLVED_ON:]
    moments = output_moments(original, final_states(original, calibration.tokens[:SOLVED_ON]))
    states, weight = final_states(original, held_out), source.read(name).float()

    def measure(label: str, stored: StoredTensor) -> None:
        changed = BlockModel(Replaced(source, stored))
        looked_up = final_states(changed, held_out)
        sums = [0.0, 0.0, 0.0]
        for state, moved in zip(states, looked_up, strict=True):
            expected = original.logits(state)
            for way, logits in enumerate((original.logits(moved), changed.logits(state), changed.logits(moved))):
                sums[way] += divergence(expected, logits) / MEASURED_ON
        print(f"{label:16} looked up {sums[0]:.4f}   output {sums[1]:.4f}   both {sums[2]:.4f}", flush=True)

    measure("rounded", round_tensor(name, weight, codec_name))
    settings = Recipe(arguments.model, arguments.target, descent=2).solver_settings
    for share in arguments.shares:
        damped = moments + share * moments.diagonal().mean() * torch.eye(len(moments))
        measure(f"solved, {share:g}", solve_linear(name, weight, damped, codec_name, settings))


if __name__ == "__main__":
    main()
