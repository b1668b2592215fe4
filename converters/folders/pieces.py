"""Under which names a folder stores the rows of a model's tensors.

Some loaders split fused linears, so that one of our tensors becomes several, and some name tensors as other checkpoints
do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from lqexport.converters.models.architecture import Architecture, Config
from lqexport.converters.models.rope import head_dim
from lqexport.converters.models.tensor_names import block_module, head_count


@dataclass(frozen=True)
class Naming:
    """How a loader's names differ from ours.

    split     fused linear -> the linears that a folder holds instead; each holds a run of the fused linear's rows
    renamed   regular expression -> replacement; together they turn our tensor names into the folder's
    """

    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def stored_names(self, architecture: Architecture, name: str) -> list[str]:
        """Returns the names under which a tensor's rows are stored, in the order of the rows.

        It is one name, or several for a fused linear.
        """
        module = block_module(architecture, name)
        if module is not None and module[2] == "weight" and module[1] in self.split:
            return [name.replace(module[1], linear) for linear in self.split[module[1]]]
        for pattern, new in self.renamed.items():
            name = re.sub(pattern, new, name)
        return [name]

    def pieces(self, architecture: Architecture, config: Config, name: str, rows: int) -> dict[str, tuple[int, int]]:
        """Returns stored name -> (first row, row behind the last) of the rows of a tensor that it holds."""
        names = self.stored_names(architecture, name)
        counts = [rows // len(names)] * len(names)
        if len(names) == 3:  # queries, keys and values
            keys = head_dim(config) * head_count(config, "num_key_value_heads")
            counts = [rows - 2 * keys, keys, keys]
        return dict(zip(names, pairwise(accumulate(counts, initial=0)), strict=True))
