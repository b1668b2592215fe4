"""Compares how the chat templates of a file and of its source render conversations, by transformers and by llama.cpp.

What counts is the tokens that the model gets. llama.cpp differs from transformers on purpose in three ways, which are
noted and fail no file: it adds BOS and EOS where the tokenizer does, it puts a space before each piece of text of a
SentencePiece model, and it sets variables that transformers leaves unset.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lqexport.calibration.sequences import begins_with_bos, ends_with_eos
from lqexport.evaluation.conversations import (
    Conversation,
    altered,
    conversations,
    prompt_tokens,
    render,
    special_ids,
    token_texts,
)
from lqexport.evaluation.llama_server import LlamaServer, ServerRefused
from lqexport.models.chat_template import refusal
from lqexport.verification.talk_record import Rendering, Talk

BEFORE, AFTER = 40, 60
"""Characters that are shown before and after the first difference."""
Ends = tuple[int | None, int | None]
"""The BOS and the EOS that llama.cpp adds to a prompt; None for none."""
PLAIN = "The capital of France is"
BOOLEANS, DATES = (
    ("enable_thinking", "preserve_thinking", "clear_thinking"),
    {"date_string": "%d %b %Y", "datetime": "%b %d %Y"},
)
"""Variables that llama.cpp sets: to true or false, and to today's date in this form."""


@dataclass(frozen=True)
class Spoken:
    """A conversation as the source renders it, with or without a generation prompt."""

    conversation: Conversation
    generation_prompt: bool
    text: str


@dataclass(frozen=True)
class FileTemplate:
    """The chat template of a file.

    texts     name -> Jinja text; the main one is called `default`
    special   the texts of the file's special tokens, by the names that a template uses: `bos_token`
    tokenizer   what splits the file's prompts in transformers; None: the source's tokenizer
    """

    texts: dict[str, str]
    special: dict[str, str]
    tokenizer: PreTrainedTokenizerBase | None = None

    def for_tools(self, tools: bool) -> str:
        """Returns the text that renders a conversation with or without tools, by transformers' and llama.cpp's rule."""
        return self.texts.get("tool_use" if tools else "default", self.texts["default"])


def source_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns name -> Jinja text of a tokenizer's chat templates; the main one is called `default`."""
    given = tokenizer.chat_template
    return dict(given) if isinstance(given, dict) else {"default": given} if given else {}


def spoken(tokenizer: PreTrainedTokenizerBase, talk: Talk) -> list[Spoken]:
    """Returns all conversations as the source renders them.

    Those that it refuses, or of which it ignores what they are about, are left out, and `talk` says so. Raises
    TimeoutError if the template does not end.
    """
    rendered = []
    for conversation in conversations(_special_texts(tokenizer)):
        try:
            texts = [render(tokenizer, conversation, prompt) for prompt in conversation.prompts]
            other = altered(conversation)
            ignored = other is not None and render(tokenizer, other, conversation.prompts[0]) == texts[0]
        except TimeoutError:
            raise
        except Exception as error:  # a template may raise anything
            talk.left_out.append(f"{conversation.name}: the source's template refuses it ({refusal(error)})")
            continue
        if ignored:
            talk.left_out.append(f"{conversation.name}: the source's template ignores what it adds")
            continue
        rendered += [Spoken(conversation, *pair) for pair in zip(conversation.prompts, texts, strict=True)]
    return rendered


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts of at most six special tokens, those that end texts and begin messages first."""
    texts = [tokenizer.bos_token, tokenizer.eos_token, *map(str, tokenizer.added_tokens_decoder.values())]
    return list(dict.fromkeys(text for text in texts if text))[:6]


def by_transformers(tokenizer: PreTrainedTokenizerBase, file: FileTemplate, source: list[Spoken]) -> list[Rendering]:
    """Returns the renderings of the file's template by transformers. Raises TimeoutError if it does not end."""
    renderings = []
    for case in source:
        variables = file.special | {"chat_template": file.for_tools(bool(case.conversation.tools))}
        try:
            text = render(tokenizer, case.conversation, case.generation_prompt, **variables)
        except TimeoutError:
            raise
        except Exception as error:  # a template may raise anything
            text = f"({refusal(error)})"
        difference = ("", "")
        if text != case.text:
            difference = around(case.text, text)
        elif file.tokenizer and (tokens := prompt_tokens(file.tokenizer, text)) != prompt_tokens(tokenizer, text):
            difference = _around_tokens(tokenizer, prompt_tokens(tokenizer, text), tokens)
        renderings.append(_rendering(case, "transformers", difference))
    return renderings


def by_llamacpp(tokenizer: PreTrainedTokenizerBase, server: LlamaServer, source: list[Spoken]) -> list[Rendering]:
    """Returns the renderings of the file's template by llama.cpp, split by the file's tokenizer."""
    renderings, ends = [], added_ends(tokenizer)
    for case in source:
        try:
            text = server.render(case.conversation.for_server(), case.conversation.tools, case.generation_prompt)
            renderings.append(_compared(tokenizer, case, text, server.tokenize(text), ends))
        except ServerRefused as error:
            renderings.append(_rendering(case, "llama.cpp", (excerpt(case.text, 0), f"({refusal(error)})")))
    return renderings


def plain_text(tokenizer: PreTrainedTokenizerBase, server: LlamaServer) -> Rendering:
    """Returns a plain text as llama.cpp feeds it to the model, beside what the source's tokenizer makes of it."""
    expected, tokens = list(tokenizer(PLAIN)["input_ids"]), server.tokenize(PLAIN)
    difference = ("", "") if tokens == expected else _around_tokens(tokenizer, expected, tokens)
    return Rendering("a plain text", False, "llama.cpp", tokens == expected, True, *difference)


def added_ends(tokenizer: PreTrainedTokenizerBase) -> Ends:
    """Returns the BOS and the EOS that the tokenizer puts around every text; None for each that it does not."""
    bos = tokenizer.bos_token_id if begins_with_bos(tokenizer) else None
    return bos, tokenizer.eos_token_id if ends_with_eos(tokenizer) else None


def _compared(tokenizer: PreTrainedTokenizerBase, case: Spoken, text: str, tokens: list[int], ends: Ends) -> Rendering:
    for variables in _variables(case.text, tokenizer, bool(case.conversation.tools)):
        expected = render(tokenizer, case.conversation, case.generation_prompt, **variables) if variables else case.text
        if (habit := _habit(tokenizer, prompt_tokens(tokenizer, expected), tokens, ends)) is not None:
            given = [f"it sets {name} to {value!r}" for name, value in variables.items()]
            return _rendering(case, "llama.cpp", ("", ""), ", ".join([*given, *habit]))
    begin = tokenizer.bos_token or ""
    shown = text if text.startswith(begin) or not case.text.startswith(begin) else begin + text
    if shown != case.text:
        return _rendering(case, "llama.cpp", around(case.text, shown))
    return _rendering(case, "llama.cpp", _around_tokens(tokenizer, prompt_tokens(tokenizer, case.text), tokens))


def _variables(text: str, tokenizer: PreTrainedTokenizerBase, tools: bool) -> Iterator[dict[str, Any]]:
    """Yields none, then all sets of values of the variables that the source's template has and llama.cpp sets."""
    template = tokenizer.get_chat_template(tools=[{}] if tools else None)
    values: dict[str, tuple[Any, ...]] = {name: (None, True, False) for name in BOOLEANS if name in template}
    values |= {name: (None, time.strftime(form)) for name, form in DATES.items() if name in template}
    for chosen in itertools.product(*values.values()):
        yield {name: value for name, value in zip(values, chosen, strict=True) if value is not None}


def _habit(tokenizer: PreTrainedTokenizerBase, expected: list[int], tokens: list[int], ends: Ends) -> list[str] | None:
    """Returns by which habits llama.cpp's tokens differ from the expected ones; None if they differ otherwise."""
    (bos, eos), habits, rest = ends, list[str](), tokens
    if bos is not None and rest[:1] == [bos] != expected[:1]:
        habits, rest = ["it adds a BOS"], rest[1:]
    if eos is not None and rest[-1:] == [eos] != expected[-1:]:
        habits, rest = [*habits, "it adds an EOS"], rest[:-1]
    if rest == expected:
        return habits
    if _without_spaces(tokenizer, rest) == _without_spaces(tokenizer, expected):
        return [*habits, "it puts a space before each piece of text"]
    return None


def _without_spaces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """Returns the special tokens, and the texts of SentencePiece between them without spaces before them."""
    special = special_ids(tokenizer)
    pieces: list[str] = []
    for is_special, group in itertools.groupby(tokens, key=lambda token: token in special):
        texts = token_texts(tokenizer, group)
        pieces += texts if is_special else ["".join(texts).lstrip("\u2581")]
    return [piece for piece in pieces if piece]


def _rendering(case: Spoken, renderer: Any, difference: tuple[str, str], note: str = "") -> Rendering:
    conversation = case.conversation
    return Rendering(
        conversation.name, case.generation_prompt, renderer, difference == ("", ""), conversation.ordinary,
        *difference, note,
    )  # fmt: skip


def _around_tokens(tokenizer: PreTrainedTokenizerBase, source: list[int], file: list[int]) -> tuple[str, str]:
    return around(token_texts(tokenizer, source), token_texts(tokenizer, file))


def around(source: Any, file: Any) -> tuple[str, str]:
    """Returns two texts, or lists of tokens' texts, around their first difference, as Python literals."""
    pairs = enumerate(zip(source, file, strict=False))
    common = next((index for index, (ours, theirs) in pairs if ours != theirs), min(len(source), len(file)))
    return excerpt(source, common), excerpt(file, common)


def excerpt(whole: Any, index: int) -> str:
    """Returns a part of a text, or of a list of tokens' texts, around an index, as a Python literal."""
    width = 1 if isinstance(whole, str) else 8
    first, last = max(0, index - BEFORE // width), index + AFTER // width
    shown = repr(whole[first:last])
    return f"{'... ' if first else ''}{shown}{' ...' if last < len(whole) else ''}"
