"""Measures what filling up experts' second moments gains on held-out tokens (lqexport/calibration/experts.py).

    python bench/experts.py MODEL --calibration FILE [--block 12] [--target gguf:Q4_0] [--samples 48]

No mixture of experts is small enough for this test, so the MLP of one block of a dense model stands for 16 experts.
A random linear router that prefers some experts sends each token to two of them. Half of the sequences are for
calibration. For up to 256 rows of each expert's up_proj and down_proj, the table has the output error on the expert's
tokens of the other half, divided by the error without filling up. Prints Markdown.
"""

from __future__ import annotations

import argparse

import torch
from dampening import errors
from torch import Tensor

from lqexport.calibration import texts
from lqexport.calibration.collect import batches
from lqexport.calibration.experts import fill_up
from lqexport.calibration.moments import SecondMoments
from lqexport.converters.models.families.mixtral import MIXTRAL
from lqexport.evaluation.protocols import tokenize
from lqexport.models.blocks import BlockModel, linear_of
from lqexport.models.source import open_source
from lqexport.recipe import Recipe

EXPERTS, CHOSEN, ROWS, LENGTH = 16, 2, 256, 512
UP, DOWN = "up_proj", "down_proj"


@torch.no_grad()
def inputs_of_block(arguments: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns weights and inputs [sequences, LENGTH, C] of the block's up_proj and down_proj."""
    source = open_source(arguments.model)
    ids = tokenize(source.tokenizer(), texts.read_text(arguments.calibration).content)
    tokens = torch.tensor(ids[: arguments.samples * LENGTH]).reshape(arguments.samples, LENGTH)
    model = BlockModel(source)
    hidden = [model.start(batch) for batch in batches(tokens)]
    for index, block in model.blocks():
        if index == arguments.block:
            names = {name: f"mlp.{name}" for name in (UP, DOWN)}
            linears = {key: linear_of(block, name) for key, name in names.items()}
            inputs: dict[str, list[Tensor]] = {key: [] for key in names}
            for key, linear in linears.items():
                linear.register_forward_pre_hook(lambda _, arguments, to=inputs[key]: to.append(arguments[0]))
            for states in hidden:
                model.run(block, states)
            weights = {key: linear.weight[:ROWS].clone() for key, linear in linears.items()}
            return weights, {key: torch.cat(parts) for key, parts in inputs.items()}
        hidden = [model.run(block, states) for states in hidden]
    raise SystemExit(f"{arguments.model} has no block {arguments.block}.")


def routed(states: Tensor) -> Tensor:
    """Returns which tokens go to each expert, bool [EXPERTS, tokens], for states [tokens, C]."""
    draw = torch.Generator().manual_seed(0)
    scores = states / states.norm(dim=1, keepdim=True) @ torch.randn(states.shape[1], EXPERTS, generator=draw) * 4
    chosen = (scores + torch.linspace(-2.5, 1, EXPERTS)).topk(CHOSEN).indices
    return torch.stack([(chosen == expert).any(1) for expert in range(EXPERTS)])


def moments(linear: str, inputs: Tensor, tokens: Tensor) -> dict[tuple[str, ...], SecondMoments]:
    """Returns the second moments of each expert's share of the inputs [tokens, C], named as in a block of experts."""
    by_expert = {}
    for expert in range(EXPERTS):
        sums = by_expert[(f"mlp.experts.{expert}.{linear}",)] = SecondMoments(
            inputs.shape[1], "normalized", inputs.device
        )
        sums.add(inputs[tokens[expert]])
    return by_expert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--target", default="gguf:Q4_0")
    parser.add_argument("--samples", type=int, default=48)
    arguments = parser.parse_args()
    weights, inputs = inputs_of_block(arguments)
    half = arguments.samples // 2
    seen, held = ({key: states.flatten(0, 1) for key, states in zip((UP, DOWN), halves, strict=True)} for halves in
                  zip(*((states[:half], states[half:]) for states in inputs.values()), strict=True))  # fmt: skip
    tokens, held_tokens = routed(seen[UP]), routed(held[UP])
    recipe, architecture = Recipe("none", arguments.target), MIXTRAL.expanded(EXPERTS)
    ratios: dict[str, list[float]] = {}
    for linear, weight in weights.items():
        plain, filled = (moments(linear, seen[linear], tokens) for _ in range(2))
        pool = SecondMoments(weight.shape[1], "normalized", weight.device)
        for expert in tokens:
            pool.add(seen[linear][expert])
        fill_up(filled, {f"mlp.experts.*.{linear}": pool}, architecture)
        ratios[linear] = []
        for name, held_moments in moments(linear, held[linear], held_tokens).items():
            with_filling, without = (
                errors(weight, used[name].hessian(), [held_moments.hessian()], recipe)[0] for used in (filled, plain)
            )
            ratios[linear].append(with_filling / without)
    print("| calibration tokens | tokens of other sequences | up_proj | down_proj |\n|---|---|---|---|")
    for expert in tokens.sum(1).argsort().tolist():
        counts = f"{int(tokens[expert].sum())} | {int(held_tokens[expert].sum())}"
        print(f"| {counts} | {ratios[UP][expert]:.3f} | {ratios[DOWN][expert]:.3f} |")


if __name__ == "__main__":
    main()
