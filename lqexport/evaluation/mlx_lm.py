"""Runs MLX folders in mlx-lm for checks and comparisons.

Logits are computed from the weights as mlx.core.dequantize decodes them, by mlx-lm's model in float32. So they are
those of the folder, whatever precision a machine multiplies in: on a CPU, mlx adds up the products of a quantized
matrix in the dtype of its scales, which is coarse, and on Apple's GPUs in float32. `continuation` runs the model as it
is.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.errors import UserError, install

MISSING = f"mlx-lm is not installed; it comes with: {install('mlx')}"


def is_installed() -> bool:
    """Returns whether mlx and mlx-lm are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


def check_installed() -> None:
    """Raises UserError if mlx or mlx-lm is missing."""
    if not is_installed():
        raise UserError(MISSING)


def share_matrix_products() -> None:
    """Gives mlx the matrix products of PyTorch, where the system lets it.

    The wheel `mlx-cpu` brings a BLAS without vector instructions, which is some twenty times slower. A library whose
    symbols are global before mlx is loaded takes its place. It must be called before mlx is imported.
    """
    spec = importlib.util.find_spec("torch") if sys.platform == "linux" else None
    if spec is not None and spec.origin is not None:
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)


class MlxLm:
    """An MLX folder, loaded by mlx_lm.load.

    Raises UserError if mlx-lm is missing or does not load the folder.
    """

    def __init__(self, folder: Path) -> None:
        check_installed()
        share_matrix_products()
        import mlx.core as mx
        import mlx_lm

        self._mx, self._lm, self._folder = mx, mlx_lm, folder
        self._exact: Any = None
        self._model, self._tokenizer = self._load()

    def _load(self) -> tuple[Any, Any]:
        try:
            return self._lm.load(str(self._folder))[:2]
        except Exception as error:  # mlx-lm raises whatever its models raise
            reason = " ".join(str(error).split())
            raise UserError(f"mlx-lm does not load {self._folder}: {type(error).__name__}: {reason}") from error

    def logits(self, tokens: list[int], first: int = 0) -> NDArray[np.float32]:
        """Returns the logits float32 [tokens - first, vocabulary] of one sequence from position `first` on."""
        if self._exact is None:
            from mlx_lm.utils import dequantize_model

            self._exact = dequantize_model(self._load()[0])
            self._exact.set_dtype(self._mx.float32)
        logits = self._exact(self._mx.array([tokens]))[0, first:]
        return np.array(logits.astype(self._mx.float32))

    def continuation(self, prompt: list[int], most: int) -> list[int]:
        """Returns at most `most` tokens after a prompt, always the most probable one, by the quantized model itself.

        A token at which mlx-lm stops is the last one.
        """
        steps = self._lm.stream_generate(self._model, self._tokenizer, prompt, max_tokens=most)
        return [int(step.token) for step in steps]

    def stops(self) -> list[int]:
        """Returns the tokens at which mlx-lm stops, in rising order."""
        return sorted(int(token) for token in self._tokenizer.eos_token_ids)
