"""Compares the scalings of a low-rank correction on the same grids: none, plain SVD, L2QER, QERA's diagonal, QERA.

    python bench/scalings.py MODEL --calibration FILE --evaluation FILE [--samples 16] [--windows 6]

LQER's rounding rounds every linear of the decoder blocks to MXINT groups of 32, as in QERA's tables: 4.25 bits and rank
32, 3.25 bits and rank 64. Float16 low-rank factors then correct the rounding error under each scaling. All scalings
have the same inputs (full-precision prefix, plain second moments). lqexport's own float32 forward pass compares each
variant with the source, in windows of 512 tokens whose second half is scored. Each block of each variant runs as soon
as it is made. Prints Markdown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import get_args

import torch
from common import comparison_parser
from judging import windows_of
from torch import Tensor, nn

from lqexport.calibration.moments import SecondMoments
from lqexport.calibration.sequences import load_calibration
from lqexport.evaluation import evaluate
from lqexport.evaluation.logits import BlockLogits
from lqexport.evaluation.protocols import LLAMACPP_512
from lqexport.formats.registry import codec_named
from lqexport.grids.fit import minmax
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.recipe import Scaling
from lqexport.solver.lowrank import column_weighting, correction

GRIDS = {"native:mxint-4-g32": 32, "native:mxint-3-g32": 64}
"""The rank of the correction for each grid."""
SCALINGS = ("none", *get_args(Scaling))
VARIANTS = [(grid, scaling) for grid in GRIDS for scaling in SCALINGS]


Inputs = tuple[Tensor, Tensor]
"""The second moments [C, C] and the largest mean magnitudes [C] of a linear's inputs."""


def gather(model: BlockModel, block: nn.Module, hidden: list[Tensor]) -> dict[str, Inputs]:
    """Returns the inputs of every linear of a block. It replaces `hidden` by the states after the block."""
    moments: dict[str, SecondMoments] = {}
    magnitudes: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs = arguments[0]
            moments.setdefault(name, SecondMoments(inputs.shape[-1], "plain", inputs.device)).add(inputs)
            mean = inputs.abs().mean(1).amax(0)
            magnitudes[name] = mean.maximum(magnitudes.get(name, mean))

        return before

    firsts = [group[0] for group in model.architecture.linears]
    handles = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in firsts]
    hidden[:] = [model.run(block, state) for state in hidden]
    for handle in handles:
        handle.remove()
    groups = {name: group[0] for group in model.architecture.linears for name in group}
    return {name: (moments[first].hessian(), magnitudes[first]) for name, first in groups.items()}


def corrected(weight: Tensor, inputs: Inputs, grid: str, scaling: str) -> Tensor:
    """Returns the weight that grid and low-rank factors store."""
    rounded = minmax(codec_named(grid), weight)
    values = rounded.values(rounded.nearest(weight))
    if scaling == "none":
        return values
    weighting = column_weighting(scaling, *inputs)  # type: ignore[arg-type]
    up, down = correction(weight - values, weighting, GRIDS[grid])
    return values + up.half().float() @ down.half().float()


def run(model: BlockModel, calibration: list[Tensor], windows: list[Tensor]) -> dict[tuple[str, str], list[Tensor]]:
    """Returns the states after the last block of every variant, and of the source under ("", "")."""
    states = {variant: list(windows) for variant in [("", ""), *VARIANTS]}
    for index, block in model.blocks():
        print(f"block {index}", flush=True)
        gathered = gather(model, block, calibration)
        for variant, hidden in states.items():
            changed = copy.deepcopy(block)
            for name, inputs in gathered.items() if variant[0] else ():
                linear = changed.get_submodule(name)
                linear.weight.data = corrected(linear.weight.data, inputs, *variant)
            hidden[:] = [model.run(changed, state) for state in hidden]
    return states


@torch.no_grad()
def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=6)
    arguments = parser.parse_args()
    source, protocol = open_source(arguments.model), LLAMACPP_512
    tokens = load_calibration(arguments.calibration, source.tokenizer(), samples=arguments.samples,
                              sequence_length=512, seed=0)  # fmt: skip
    model, windows = BlockModel(source), windows_of(source, arguments.evaluation, arguments.windows)
    states = run(model, [model.start(row[None]) for row in tokens.tokens],
                 [model.start(torch.from_numpy(window)[None]) for window in windows])  # fmt: skip
    logits = {
        variant: BlockLogits(model, [state[:, protocol.first - 1 : -1] for state in hidden])
        for variant, hidden in states.items()
    }
    print("| grid | rank | scaling | mean KL | perplexity | same top-1 |\n|---|---|---|---|---|---|")
    for grid, scaling in VARIANTS:
        score = evaluate.compare(logits["", ""], logits[grid, scaling], windows, protocol)
        rank = GRIDS[grid] if scaling != "none" else ""
        perplexity = f"{score.perplexity:.2f} ± {score.perplexity_error:.2f}"
        print(
            f"| {grid} | {rank} | {scaling} | {score.kl:.4f} ± {score.kl_error:.4f} | {perplexity} | {score.top1:.1%} |"
        )
    print(f"source: perplexity {score.reference_perplexity:.2f}")


if __name__ == "__main__":
    main()
