"""What llama.cpp's rounding of inputs to 8 bits costs a model, linear by linear, and what smoothing leaves of it.

    python bench/smoothing.py MODEL --calibration FILE --evaluation FILE [--windows 4] [--powers 0 0.1 0.2 0.35 0.5]

Weights are not quantized. The mean KL against the model without rounding, where the inputs of some linears alone are
rounded as llama.cpp does: Q8_K, one scale for 256 numbers, which goes with K-quants, and Q8_0, one for 32. Each row is
a power of the inputs' size that the columns are scaled by; 0 is none. Prints Markdown.
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
from lqexport.evaluation import evaluate
from lqexport.evaluation.evaluate import block_logits
from lqexport.models.blocks import BlockModel
from lqexport.models.interface import Weights
from lqexport.models.smoothing import SEQUENCES, Smoothed, column_scales, pairs
from lqexport.models.source import open_source
from lqexport.runtime.progress import Silent

KINDS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",), "all": ("_proj",),
}  # fmt: skip


def rounded(group: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds inputs to 8 bits with one scale for `group` numbers."""

    def hook(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        parts = arguments[0].unflatten(-1, (-1, group))
        scale = parts.abs().amax(-1, keepdim=True) / 127
        return ((parts / scale.where(scale > 0, 1)).round().mul(scale).flatten(-2),)

    return hook


class Rounding(BlockModel):
    """A model in which the inputs of some linears are rounded."""

    def __init__(self, weights: Weights, group: int, kinds: Sequence[str]) -> None:
        super().__init__(weights)
        self._group, self._kinds = group, kinds

    def block(self, index: int, experts: Collection[int] | None = None) -> torch.nn.Module:
        block = super().block(index, experts)
        for name in self.linears(index):
            if any(kind in name for kind in self._kinds):
                block.get_submodule(name).register_forward_pre_hook(rounded(self._group))
        return block


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--powers", type=float, nargs="+", default=[0, 0.1, 0.2, 0.35, 0.5])
    arguments = parser.parse_args()
    source, protocol = open_source(arguments.model), evaluate.PROTOCOLS["llama.cpp-512"]
    ids = evaluate.tokenize(source.tokenizer(), texts.read_text(arguments.evaluation).content)
    windows = np.array(ids[: arguments.windows * 512]).reshape(-1, 512)
    calibration = load_calibration(
        arguments.calibration, source.tokenizer(), samples=SEQUENCES, sequence_length=512, seed=0
    )
    model = BlockModel(source)
    magnitudes, found = input_magnitudes(model, calibration.tokens), pairs(model.architecture, len(model))

    def predictions(model: BlockModel) -> list[Tensor]:
        return [torch.log_softmax(found.double(), -1) for found in block_logits(model, windows, protocol, Silent(), "")]

    reference = predictions(model)
    print(f"| power | {' | '.join(KINDS)} | all, Q8_0 |\n|---|{'---|' * (len(KINDS) + 1)}")
    for power in arguments.powers:
        losses = []
        smoothed = Smoothed(source, {pair: column_scales(magnitudes[pair.takers[0]], power) for pair in found})
        for group, kinds in [*((256, kinds) for kinds in KINDS.values()), (32, KINDS["all"])]:
            both = zip(reference, predictions(Rounding(smoothed, group, kinds)), strict=True)
            divergences = [(exact.exp() * (exact - rough)).sum(-1).mean() for exact, rough in both]
            losses.append(f"{float(torch.stack(divergences).mean()):.5f}")
        print(f"| {power:g} | {' | '.join(losses)} |", flush=True)


if __name__ == "__main__":
    main()
