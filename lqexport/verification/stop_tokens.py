"""Compares the tokens at which an answer ends: the source's, those that the file names, and those of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lqexport.errors import listed
from lqexport.evaluation.conversations import Conversation, prompt_tokens, render, special_ids, token_texts
from lqexport.evaluation.llama_server import LlamaServer
from lqexport.storage.files import optional_json
from lqexport.verification.talk_record import StopToken

KEYS = ("eos", "eot", "eom")
"""Roles of the stop tokens that a GGUF file can name."""
ANSWER = "The capital of France is Paris."


def of_folder(folder: Path | None, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids at which transformers' generation or a server of the folder ends, the tokenizer's EOS first.

    folder   with generation_config.json, whose list counts before config.json's; None where there is no such folder

    Ids of ordinary tokens are left out: some configs keep those of another model.
    """
    generation = optional_json(folder / "generation_config.json") if folder else {}
    given = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
    known = special_ids(tokenizer)
    return list(dict.fromkeys(number for number in ids if isinstance(number, int) and number in known))


def of_metadata(metadata: dict[str, Any]) -> list[int]:
    """Returns the ids that a GGUF file's metadata names as stop tokens, eos first if there is one."""
    ids = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in KEYS]
    return list(dict.fromkeys(number for number in ids if isinstance(number, int)))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that the chat template puts right behind an answer; None if there is none."""
    turns = ({"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": ANSWER})
    try:
        text = render(tokenizer, Conversation("", turns), generation_prompt=False)
    except Exception:  # a template may raise anything
        return None
    ids = prompt_tokens(tokenizer, text.rpartition(ANSWER)[2].lstrip())
    return ids[0] if ids and ids[0] in special_ids(tokenizer) else None


def stop_tokens(
    tokenizer: PreTrainedTokenizerBase, source: list[int], file: list[int], server: LlamaServer | None
) -> list[StopToken]:
    """Returns the source's stop tokens, and the token that ends a turn, with what the file and llama.cpp do at them."""
    ends = end_of_turn(tokenizer) if tokenizer.chat_template else None
    ids = list(dict.fromkeys([*source, *([] if ends is None else [ends])]))
    return [
        StopToken(number, _text(tokenizer, number), number in file,
                  server.stops_at(number, [number]) if server else None, number == ends)
        for number in ids
    ]  # fmt: skip


def _text(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    return token_texts(tokenizer, [number])[0]


def faults(
    tokens: list[StopToken], tokenizer: PreTrainedTokenizerBase, source: list[int], file: list[int], gguf: bool
) -> tuple[list[str], list[str]]:
    """Returns the sentences that fail a file for its stop tokens, and the warnings.

    A GGUF file names at most three stop tokens. llama.cpp also stops at tokens whose names it knows; where it was
    tried, what it does counts.
    """
    if not source:
        return [], []
    failed: list[str] = []
    warnings: list[str] = []
    if first := [number for number in file[:1] if number not in source]:
        failed.append(
            f"The file ends an answer at {_text(tokenizer, first[0])!r} ({first[0]}), where the source does not: its "
            f"stop tokens are {_listed(tokenizer, source)}."
        )
    if not file:
        failed.append(f"The file names no stop token, and the source's are {_listed(tokenizer, source)}.")
    full = gguf and len(file) == len(KEYS) and set(file) <= set(source)
    for token in tokens:
        sentences = _faults_of(token, token.id in source, gguf)
        for fails, sentence in sentences:
            (failed if fails and not full else warnings).append(sentence)
    return failed, warnings


def _faults_of(token: StopToken, of_source: bool, gguf: bool) -> list[tuple[bool, str]]:
    """Returns whether the file fails, and a sentence, for what is wrong with one stop token."""
    plain = f"{token.text!r} ({token.id})"
    name = plain + (", which ends a turn," if token.ends_turn else "")
    if token.stops is False and of_source:
        return [(True, f"llama.cpp does not stop at {name} as the source does.")]
    if token.stops or (token.in_file and token.stops is None):
        missing = of_source and token.ends_turn and not token.in_file
        return [(False, f"The file does not name {name} as a stop token; llama.cpp knows it by name.")] * missing
    if of_source:
        fails = token.ends_turn or not gguf
        return [(fails, f"The file does not name {name} as a stop token, as the source does.")]
    return [(False, f"The source's chat template ends a turn with {plain}, at which neither source nor file stops.")]


def _listed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return listed([f"{_text(tokenizer, number)!r} ({number})" for number in ids])
