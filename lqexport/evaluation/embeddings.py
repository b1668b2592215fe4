"""Compares an encoder's sentence embeddings with its source's: their cosine, and whether the nearest neighbours agree.

Every sentence is embedded without padding, with the model's own pooling.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase

from lqexport.errors import UserError
from lqexport.evaluation.evaluate import mean_and_error
from lqexport.evaluation.llamacpp_process import LlamaCppProcess
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener

NEIGHBOURS = 10
"""The number of nearest neighbours that are compared for each sentence."""
SENTENCES = 1000
"""The most sentences of a text, unless another number is given."""
SHORTEST, LONGEST = 30, 300
"""The fewest and the most characters of a sentence that is used."""
BATCH = 64
"""The most sentences in a batch."""


@dataclass(frozen=True)
class Similarity:
    """Measures of how close an encoder's embeddings are to its source's.

    sentences     the number of sentences
    cosine        the mean cosine of a sentence's embedding and the source's; cosine_least: the smallest
    recall        the share of a sentence's NEIGHBOURS nearest neighbours in the source that are also among its
                  NEIGHBOURS nearest in the file; mean over the sentences
    top1          the share of sentences whose nearest neighbour is the same
    kendall       the mean of Kendall's tau between the file's and the source's ranking of the source's NEIGHBOURS
                  nearest neighbours: 1 for the same order, -1 for the opposite order

    Every `_error` is one standard error over the sentences.
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
    """Returns different sentences of a text, in the order of the text and spread evenly over it.

    most   the most sentences; None: SENTENCES

    Raises UserError if there are not more than NEIGHBOURS.
    """
    candidates = (" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    distinct = list(dict.fromkeys(sentence for sentence in candidates if SHORTEST <= len(sentence) <= LONGEST))
    count = min(SENTENCES if most is None else most, len(distinct))
    if count <= NEIGHBOURS:
        raise UserError(
            f"The text gives {count} sentences of {SHORTEST} to {LONGEST} characters, and ranking needs more than "
            f"{NEIGHBOURS}. Give a longer text, or ask for more."
        )
    return [distinct[index * len(distinct) // count] for index in range(count)]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> list[list[int]]:
    """Returns the token ids of each text with the tokenizer's special tokens, cut to at most `longest` tokens."""
    return [list(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]]


@torch.no_grad()
def embeddings(model: BlockModel, ids: list[list[int]], listener: Listener, description: str) -> Tensor:
    """Returns the embedding of each sentence, float32 [sentences, hidden], normalized to length 1, on the CPU.

    The model runs block by block. A batch holds sentences of one number of tokens, so no padding is needed.
    """
    by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    batches: list[list[int]] = []
    for index in by_length:
        if not batches or len(batches[-1]) == BATCH or len(ids[batches[-1][0]]) != len(ids[index]):
            batches.append([])
        batches[-1].append(index)
    listener.stage(description, len(model) * len(batches))
    hidden = [model.start(torch.tensor([ids[index] for index in batch])) for batch in batches]
    for _, block in model.blocks():
        for number, states in enumerate(hidden):
            hidden[number] = model.run(block, states)
            listener.advance(1)
    by_batch = torch.cat([model.embedding(states) for states in hidden]).float().cpu()
    order = torch.tensor([index for batch in batches for index in batch])
    return by_batch[order.argsort()]


def engine_embeddings(engine: LlamaCppProcess, ids: list[list[int]], listener: Listener) -> Tensor:
    """Returns the same embeddings as `embeddings` for the file that llama.cpp has loaded.

    Raises UserError as `LlamaCppProcess.embedding` does.
    """
    listener.stage("Run the file in llama.cpp", len(ids))
    rows = []
    for sentence in ids:
        rows.append(torch.from_numpy(engine.embedding(sentence)))
        listener.advance(1)
    return normalize(torch.stack(rows), dim=1)


def similarity(reference: Tensor, test: Tensor) -> Similarity:
    """Returns how close the embeddings `test` are to the source's embeddings `reference` of the same sentences.

    Both are [sentences, hidden], normalized to length 1, with more than NEIGHBOURS sentences.
    """
    cosine = (reference.double() * test.double()).sum(1)
    scores = [_to_others(embedded) for embedded in (reference, test)]
    nearest = [score.topk(NEIGHBOURS).indices for score in scores]
    recall = (nearest[0][:, :, None] == nearest[1][:, None]).any(2).double().mean(1)
    top1 = (nearest[0][:, 0] == nearest[1][:, 0]).double()
    ranked = scores[1].gather(1, nearest[0])  # the file's scores, in the order of the source's ranking
    first, second = torch.triu_indices(NEIGHBOURS, NEIGHBOURS, 1)
    kendall = (ranked[:, first] - ranked[:, second]).sign().double().mean(1)
    means = [mean_and_error(values.numpy()) for values in (cosine, recall, top1, kendall)]
    return Similarity(len(reference), *means[0], float(cosine.min()), *means[1], *means[2], *means[3])


def _to_others(embedded: Tensor) -> Tensor:
    """Returns the cosine of each sentence with every other [sentences, sentences].

    The diagonal is -2, which is below any cosine, so that no sentence is its own neighbour.
    """
    return (embedded.double() @ embedded.double().T).fill_diagonal_(-2)
