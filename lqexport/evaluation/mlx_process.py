"""Runs mlx-lm in a child process: neither mlx nor what it does to its process touches this one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lqexport.evaluation import mlx_lm
from lqexport.evaluation.engine_process import PATIENCE, EngineFailed, EngineProcess


class MlxFailed(EngineFailed):
    """mlx-lm did not load or run a folder. The fault may be the folder's."""


class MlxProcess(EngineProcess):
    """An MLX folder loaded by mlx-lm in a child process. The methods are those of `MlxLm`.

    The attribute `stops` has the tokens at which mlx-lm stops. Raises UserError if mlx-lm is missing, and MlxFailed as
    `EngineProcess` does. mlx-lm gives no signs of life: `patience` is the most seconds for a sequence.
    """

    engine, child, failure = "mlx-lm", "lqexport.evaluation.mlx_child", MlxFailed

    def __init__(self, folder: Path, patience: float = PATIENCE) -> None:
        mlx_lm.check_installed()
        super().__init__(folder, {}, patience)
        self.stops: list[int] = self.loaded["stops"]

    def logits(self, tokens: list[int], first: int = 0) -> NDArray[np.float32]:
        """Returns the logits of one sequence from position `first` on, as `MlxLm.logits` does."""
        return self._ask(["logits", tokens, first], "ran")

    def continuation(self, prompt: list[int], most: int) -> list[int]:
        """Returns at most `most` tokens after a prompt, as `MlxLm.continuation` does."""
        return self._ask(["continuation", prompt, most], "ran")
