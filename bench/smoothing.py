"""Measures what llama.cpp's rounding of inputs to 8 bits costs a model, by group of linears.

With and without smoothing.

    python bench/smoothing.py MODEL --calibration FILE --evaluation FILE [--windows 4] [--powers 0 0.1 0.2 0.35 0.5]

Weights are not quantized. Only the inputs of some linears are rounded, as llama.cpp rounds them: to Q8_K for K-quants,
with one scale for 256 numbers, or to Q8_0, with one for 32. The table has the mean KL against the model without
rounding. In each row, the columns are scaled by another power of the inputs' size; 0 means no smoothing. Prints
Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from common import comparison_parser
from torch import Tensor

from lqexport.calibration import texts
from lqexport.calibration.collect import input_magnitudes
from lqexport.calibration.sequences import load_calibration
from lqexport.evaluation.logits import block_logits
from lqexport.evaluation.protocols import PROTOCOLS, tokenize
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.models.smoothing import SEQUENCES, Smoothed, column_scales, pairs
from lqexport.models.source import open_source
from lqexport.runtime.progress import Silent

LINEARS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",), "all": ("_proj",),
}  # fmt: skip


def rounded(group: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Returns a hook that rounds inputs to 8 bits with one scale for `group` numbers."""

    def hook(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        groups = arguments[0].unflatten(-1, (-1, group))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        return ((groups / scale.where(scale > 0, 1)).round().mul(scale).flatten(-2),)

    return hook


class Rounding(BlockModel):
    """A model in which the inputs of linears are rounded if their name contains one of `linears`."""

    def __init__(self, weights: Weights, group: int, linears: Sequence[str]) -> None:
        super().__init__(weights)
        self._group, self._rounded = group, linears

    def block(self, index: int, experts: Collection[int] | None = None) -> torch.nn.Module:
        block = super().block(index, experts)
        for name in self.linears(index):
            if any(linear in name for linear in self._rounded):
                block.get_submodule(name).register_forward_pre_hook(rounded(self._group))
        return block


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--powers", type=float, nargs="+", default=[0, 0.1, 0.2, 0.35, 0.5])
    arguments = parser.parse_args()
    source, protocol = open_source(arguments.model), PROTOCOLS["llama.cpp-512"]
    ids = tokenize(source.tokenizer(), texts.read_text(arguments.evaluation).content)
    windows = np.array(ids[: arguments.windows * 512]).reshape(-1, 512)
    calibration = load_calibration(
        arguments.calibration, source.tokenizer(), samples=SEQUENCES, sequence_length=512, seed=0
    )
    model = BlockModel(source)
    magnitudes, smoothed_pairs = input_magnitudes(model, calibration.tokens), pairs(model.architecture, len(model))

    def predictions(model: BlockModel) -> list[Tensor]:
        return [
            torch.log_softmax(logits.double(), -1) for logits in block_logits(model, windows, protocol, Silent(), "")
        ]

    reference = predictions(model)
    print(f"| power | {' | '.join(LINEARS)} | all, Q8_0 |\n|---|{'---|' * (len(LINEARS) + 1)}")
    for power in arguments.powers:
        losses = []
        smoothed = Smoothed(source, {pair: column_scales(magnitudes[pair.takers[0]], power) for pair in smoothed_pairs})
        for group, linears in [*((256, linears) for linears in LINEARS.values()), (32, LINEARS["all"])]:
            both = zip(reference, predictions(Rounding(smoothed, group, linears)), strict=True)
            divergences = [(exact.exp() * (exact - rough)).sum(-1).mean() for exact, rough in both]
            losses.append(f"{float(torch.stack(divergences).mean()):.5f}")
        print(f"| {power:g} | {' | '.join(losses)} |", flush=True)


if __name__ == "__main__":
    main()
