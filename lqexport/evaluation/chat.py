"""What a model answers to questions, turn by turn, always by its likeliest token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lqexport.errors import UserError

OWN = Path(__file__).with_name("questions.jsonl")


@dataclass(frozen=True)
class Question:
    """What a user says, turn by turn."""

    id: str
    turns: tuple[str, ...]


def read_questions(path: Path | None = None) -> list[Question]:
    """The questions in a .jsonl file, or our own few. A line is `{"id": ..., "turns": ["...", ...]}`; `question_id`
    means `id`, as in MT-Bench's file. Raises UserError where the file cannot be read or a line is no question."""
    try:
        lines = [line for line in (path or OWN).read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [_question(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} has a line that is no question such as {{"id": "a", "turns": ["..."]}}: {error}.'
        ) from error
    if not found:
        raise UserError(f"{path} holds no question.")
    return found


def _question(entry: dict[str, Any]) -> Question:
    turns = entry["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError("turns must be a list of texts")
    return Question(str(entry.get("id", entry.get("question_id"))), tuple(turns))


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], tokens: int) -> list[str]:
    """What the model says after each turn, at most `tokens` long."""
    said: list[dict[str, str]] = []
    for turn in turns:
        said.append({"role": "user", "content": turn})
        prompt = torch.tensor([_prompt(tokenizer, said)], device=model.device)
        with torch.no_grad():
            written = model.generate(  # type: ignore[operator]  # transformers' mixin hides its type
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )  # fmt: skip
        text = str(tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))
        said.append({"role": "assistant", "content": text.strip()})
    return [entry["content"] for entry in said[1::2]]


def _prompt(tokenizer: PreTrainedTokenizerBase, said: list[dict[str, str]]) -> list[int]:
    """Tokens of a conversation that the model should go on with; by its chat template, where it has one."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "".join(f"{entry['role'].title()}: {entry['content']}\n\n" for entry in said)
    return list(tokenizer(f"{text}Assistant:")["input_ids"])
