"""Makes an importance matrix: the squared inputs of every linear, summed up in one forward pass of the source."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lqexport.calibration.collect import by_weight, forward_pass
from lqexport.calibration.moments import InputSquares
from lqexport.calibration.sequences import load_calibration
from lqexport.converters.gguf.imatrix import write_imatrix
from lqexport.converters.models.tensor_names import gguf_names, group_count
from lqexport.errors import UserError, files_at_hand
from lqexport.models.blocks import BlockModel
from lqexport.models.column_order import in_order
from lqexport.models.latent import for_drafts
from lqexport.models.source import open_source
from lqexport.recipe import CALIBRATION_TEXT, check_sequences
from lqexport.runtime.environment import choose_device, full_float32
from lqexport.runtime.progress import Listener, Silent
from lqexport.storage.files import check_new


@files_at_hand()
@torch.no_grad()
def make_imatrix(
    source: str, path: str | Path, *, calibration: str = CALIBRATION_TEXT, samples: int = 64,
    sequence_length: int = 512, seed: int = 0, device: str = "auto", listener: Listener | None = None,
) -> None:  # fmt: skip
    """Writes an importance matrix as a GGUF file, for `quantize --imatrix` and llama.cpp's quantizer.

    source        a folder, a hub id or a .gguf file
    calibration, samples, sequence_length, seed   as in a `Recipe`

    Raises UserError for bad input, before any work where that is possible.
    """
    check_sequences(samples, sequence_length)
    full_float32()
    path, listener = Path(path), listener or Silent()
    check_new(path)
    weights = in_order(for_drafts(open_source(source)), True)
    model = BlockModel(weights, choose_device(device))
    if model.architecture.gguf is None:
        raise UserError(f"llama.cpp does not run {model.architecture.classes[0]}, so no file needs its matrix.")
    tokens = load_calibration(
        calibration, weights.tokenizer(), samples=samples, sequence_length=sequence_length, seed=seed,
        encoder=model.architecture.encoder,
    ).tokens  # fmt: skip
    sums: dict[str, list[Tensor]] = {}
    for name, collected in squares(model, tokens, listener):
        groups = group_count(model.architecture, model.weights.config, name)
        sums.setdefault(gguf_names(model.architecture, len(model))[name], []).extend([collected] * groups)
    arrays = {name: torch.stack(matrices).cpu().numpy().astype(np.float32) for name, matrices in sums.items()}
    write_imatrix(path, arrays, dataset=Path(calibration).name, chunks=len(tokens), chunk_size=sequence_length)


def squares(model: BlockModel, tokens: Tensor, listener: Listener) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of every linear's weight with what `InputSquares` has of its inputs.

    tokens   ids, int64 [samples, length]

    The experts of a block come in their order.
    """
    listener.stage("Squares of inputs", len(model))
    new = partial(InputSquares, device=model.device)
    for moments in forward_pass(model, tokens, new, wanted=lambda *_: True, last=len(model) - 1):
        yield from by_weight(model, moments).items()
        listener.advance(1)
