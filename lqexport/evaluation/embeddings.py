"""How far an encoder's embeddings of sentences are from its source's, and whether they still find the same neighbours.

Every sentence is embedded by itself, without padding, as the model's own pooling says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from lqexport.errors import UserError
from lqexport.evaluation.evaluate import mean_and_error
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener

NEIGHBOURS = 10
SENTENCES = 1000
"""At most so many of a text, where no number is given."""
SHORTEST, LONGEST = 30, 300
"""Characters of a sentence."""
BATCH = 64


@dataclass(frozen=True)
class Similarity:
    """Every `_error` is one standard error over the sentences.

    cosine        mean of a sentence's embedding to the source's, and the least
    recall        share of a sentence's NEIGHBOURS nearest others, by the source, that are among those by the file
    top1          share of sentences whose nearest other is the same
    kendall       mean of Kendall's tau: how the file ranks the source's NEIGHBOURS nearest, 1 in the same order, -1 in
                  the opposite one
    """

    sentences: int
    cosine: float
    cosine_error: float
    cosine_least: float
    recall: float
    recall_error: float
    top1: float
    top1_error: float
    kendall: float
    kendall_error: float


def sentences(text: str, most: int | None = None) -> list[str]:
    """Different sentences of a text in its order, at most so many (SENTENCES), spread evenly over it. Raises UserError
    where there are too few to rank."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    found = list(dict.fromkeys(part for part in parts if SHORTEST <= len(part) <= LONGEST))
    count = min(SENTENCES if most is None else most, len(found))
    if count <= NEIGHBOURS:
        raise UserError(
            f"The text gives {count} sentences of {SHORTEST} to {LONGEST} characters, and ranking needs more than "
            f"{NEIGHBOURS}. Give a longer text, or ask for more."
        )
    return [found[index * len(found) // count] for index in range(count)]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> list[list[int]]:
    """Token ids of each text, cut to so many, with the special tokens that the tokenizer adds."""
    return [list(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]]


@torch.no_grad()
def embeddings(model: BlockModel, ids: list[list[int]], listener: Listener, description: str) -> Tensor:
    """Of each sentence, float32 [sentences, hidden], of length 1; block by block, sentences of one length together."""
    by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    batches: list[list[int]] = []
    for index in by_length:
        if not batches or len(batches[-1]) == BATCH or len(ids[batches[-1][0]]) != len(ids[index]):
            batches.append([])
        batches[-1].append(index)
    listener.stage(description, len(model) * len(batches))
    hidden = [model.start(torch.tensor([ids[index] for index in batch])) for batch in batches]
    for _, block in model.blocks():
        for place, states in enumerate(hidden):
            hidden[place] = model.run(block, states)
            listener.advance(1)
    found = torch.cat([model.embedding(states) for states in hidden]).float().cpu()
    order = torch.tensor([index for batch in batches for index in batch])
    return found[order.argsort()]


def engine_embeddings(file: Path, ids: list[list[int]], listener: Listener) -> Tensor:
    """The same of a .gguf file, computed by llama.cpp."""
    listener.stage("Run the file in llama.cpp", len(ids))
    found = []
    with LlamaCpp(file, max(map(len, ids)), embeddings=True) as engine:
        for sentence in ids:
            found.append(torch.from_numpy(engine.embedding(sentence)))
            listener.advance(1)
    return normalize(torch.stack(found), dim=1)


def similarity(reference: Tensor, test: Tensor) -> Similarity:
    """Of embeddings [sentences, hidden] of length 1, more than NEIGHBOURS, to the source's of the same sentences."""
    cosine = (reference.double() * test.double()).sum(1)
    scores = [_to_others(embedded) for embedded in (reference, test)]
    nearest = [score.topk(NEIGHBOURS).indices for score in scores]
    recall = (nearest[0][:, :, None] == nearest[1][:, None]).any(2).double().mean(1)
    top1 = (nearest[0][:, 0] == nearest[1][:, 0]).double()
    ranked = scores[1].gather(1, nearest[0])  # by falling score of the source
    first, second = torch.triu_indices(NEIGHBOURS, NEIGHBOURS, 1)
    kendall = (ranked[:, first] - ranked[:, second]).sign().double().mean(1)
    parts = [mean_and_error(values.numpy()) for values in (cosine, recall, top1, kendall)]
    return Similarity(len(reference), *parts[0], float(cosine.min()), *parts[1], *parts[2], *parts[3])


def _to_others(embedded: Tensor) -> Tensor:
    """Cosine of each sentence to every other [sentences, sentences], and less than any to itself."""
    return (embedded.double() @ embedded.double().T).fill_diagonal_(-2)
