"""Lets a model write text to calibrate on: text of the sorts that it was trained on, without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lqexport.calibration.sequences import ids_before
from lqexport.errors import UserError, files_at_hand
from lqexport.models.blocks import BlockModel
from lqexport.models.chat_template import rendered
from lqexport.models.source import open_source
from lqexport.recipe import check_sequences
from lqexport.runtime.environment import choose_device
from lqexport.runtime.progress import Listener, Silent
from lqexport.storage.files import check_new, written_whole

BATCH = 32
"""Sequences that are written at once."""
MARK = "\u2063text\u2063"
"""A message that no chat template contains: what stands before it begins a user's message."""


@files_at_hand()
@torch.no_grad()
def write_text(
    source: str, path: str | Path, *, samples: int = 64, sequence_length: int = 512, seed: int = 0,
    device: str = "auto", listener: Listener | None = None,
) -> None:  # fmt: skip
    """Writes a file of JSON Lines with texts of the model's own, for `quantize --calibration`.

    Half of the texts go on from a random token. The other half are conversations: the model writes the user's message,
    too, after the beginning that its chat template gives. A model without a template, or whose template refuses a
    conversation of one message, writes the first sort alone. Each token is drawn from all that the model predicts, at
    temperature 1.

    source            a folder, a hub id or a .gguf file
    samples           the number of texts
    sequence_length   tokens in each text

    Equal arguments give equal texts on one machine; another may round otherwise. Raises UserError for bad input.
    """
    check_sequences(samples, sequence_length)
    path, listener = Path(path), listener or Silent()
    check_new(path)
    weights = open_source(source)
    tokenizer, torch_device = weights.tokenizer(), choose_device(device)
    model = BlockModel(weights, torch_device, torch.float32 if torch_device.type == "cpu" else torch.bfloat16)
    if model.architecture.encoder:
        raise UserError(f"{weights.name} is an encoder and writes no text: give it a file to calibrate on.")
    starts = beginnings(tokenizer, weights.shape(model.architecture.embedding)[0], samples, seed)
    if (longest := max(map(len, starts))) >= sequence_length:
        raise UserError(f"The chat template begins with {longest} tokens: texts need a larger --sequence-length.")
    first, whole = len(ids_before(tokenizer)), model.whole()
    listener.stage("Write texts", samples)
    with torch.random.fork_rng(), written_whole(path) as file:
        check_new(path)  # another process may have written it meanwhile
        torch.manual_seed(seed)
        for texts in _written(whole, model.device, starts, sequence_length):
            for ids in texts.tolist():
                line = json.dumps({"text": tokenizer.decode(ids[first:])}, ensure_ascii=False)
                file.write(f"{line}\n".encode())
            listener.advance(len(texts))


def beginnings(tokenizer: Any, vocabulary: int, samples: int, seed: int) -> list[list[int]]:
    """Returns the token ids that every text begins with; those of equal length stand together.

    vocabulary   rows of the embedding: tokens beyond it cannot be drawn
    """
    first = ids_before(tokenizer)
    ordinary = sorted(set(range(min(len(tokenizer), vocabulary))) - set(tokenizer.all_special_ids))
    chosen = torch.randint(len(ordinary), (samples,), generator=torch.Generator().manual_seed(seed)).tolist()
    before = _before_a_message(tokenizer) if tokenizer.chat_template else None
    conversations = 0 if before is None else samples // 2
    free = [[*first, ordinary[index]] for index in chosen[conversations:]]
    return free if before is None else free + [before] * conversations


def _before_a_message(tokenizer: Any) -> list[int] | None:
    """Returns the token ids before a user's first message; None if the chat template does not render such a one."""
    try:
        before, mark, _ = rendered(tokenizer, [{"role": "user", "content": MARK}]).partition(MARK)
    except Exception:  # a template may raise anything
        return None
    return list(tokenizer(before, add_special_tokens=False).input_ids) if mark else None


def _written(whole: Any, device: torch.device, starts: list[list[int]], length: int) -> Iterator[torch.Tensor]:
    """Yields token ids [batch, length] of texts that go on from `starts`.

    whole   the model as transformers has it, on the device
    """
    for begin in range(0, len(starts), BATCH):
        batch = starts[begin : begin + BATCH]
        for size in sorted({len(start) for start in batch}):
            ids = torch.tensor([start for start in batch if len(start) == size], device=device)
            # Without eos_token_id, a text that ends is followed by the next one.
            yield whole.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=length - size, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
