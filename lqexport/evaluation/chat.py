"""Generates a model's answers to questions, turn by turn, by greedy decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqexport.calibration.documents import HALF, is_whole, numbered_lines, plain
from lqexport.errors import UserError
from lqexport.models.chat_template import refusal, rendered

DEFAULT_QUESTIONS = Path(__file__).with_name("questions.jsonl")


@dataclass(frozen=True)
class Question:
    """The turns of a user in one conversation."""

    id: str
    turns: tuple[str, ...]


def read_questions(path: Path | None = None) -> list[Question]:
    """Returns the questions in a .jsonl file; None: the few questions that come with lqexport.

    A line is `{"id": ..., "turns": ["...", ...]}`. `question_id` may stand for `id`, as in MT-Bench's file. Raises
    UserError if the file cannot be read, a line is not a question, or there is none.
    """
    path = path or DEFAULT_QUESTIONS
    try:
        questions = [_question(json.loads(line)) for _, line in numbered_lines(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise UserError(f"Cannot read the questions {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} has a line that is no question such as {{"id": "a", "turns": ["..."]}}: {error}.'
        ) from error
    if not questions:
        raise UserError(f"{path} holds no question.")
    return questions


def _question(entry: dict[str, Any]) -> Question:
    turns = entry["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("turns must be a list of texts")
    if not all(map(is_whole, turns)):
        raise ValueError(HALF)
    return Question(str(entry.get("id", entry.get("question_id"))), tuple(turns))


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], tokens: int) -> list[str]:
    """Returns the model's answer to each turn, at most `tokens` tokens each.

    Every prompt holds the turns and answers before it.
    """
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        prompt = torch.tensor([prompt_ids(tokenizer, messages)], device=model.device)
        with torch.no_grad():
            generated = model.generate(  # type: ignore[operator]  # transformers' mixin hides its type
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )  # fmt: skip
        text = str(tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": text.strip()})
    return [entry["content"] for entry in messages[1::2]]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Returns the token ids of a conversation, up to where the model's answer begins.

    The text follows the tokenizer's chat template, if there is one. Raises UserError if the template refuses the
    conversation, or does not come to an end.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(f"{plain(tuple(messages))}\n\nAssistant:")["input_ids"])
    try:
        text = rendered(tokenizer, messages, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        raise UserError(f"The model's chat template refuses a conversation: {refusal(error)}.") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
