"""The conversations that chat templates are compared on, and their rendering by a tokenizer of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lqexport.models.chat_template import rendered

Message = dict[str, Any]

TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Returns the weather in a city, "now" or <later>.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    }
]
"""The definition of a tool."""


@dataclass(frozen=True)
class Conversation:
    """Messages that a chat template renders.

    tools      definitions of tools
    ordinary   whether any engine should render it as transformers does: plain text, in turns
    """

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    ordinary: bool = False

    @property
    def prompts(self) -> tuple[bool, ...]:
        """Returns whether to render it with a generation prompt, for each rendering: both, or without after an answer.

        No engine asks for an answer behind an answer.
        """
        last = self.messages[-1]
        return (False,) if last["role"] == "assistant" else (True, False)

    def for_server(self) -> list[Message]:
        """Returns the messages in OpenAI's form, in which the arguments of a tool call are JSON text."""
        messages = copy.deepcopy(list(self.messages))
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return messages


def conversations(special: list[str]) -> list[Conversation]:
    """Returns the conversations. `special` are texts of special tokens, which one of them has in its content."""
    user, again = _says("user", "What is the capital of France?"), _says("user", "And of Italy?")
    answer = _says("assistant", "The capital of France is Paris.")
    system = _says("system", "You answer in one sentence.")
    call = {"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}
    calls = [{"id": "a1b2c3d4e", "type": "function", "function": call}]  # Mistral wants ids of nine characters
    called = _says("assistant", "") | {"tool_calls": calls}
    result = _says("tool", '{"sky": "clear"}') | {"tool_call_id": "a1b2c3d4e", "name": "get_weather"}
    odd = "  1\\n 2\t\"3\" '4' {{ five }} {% six %} <b> & é 日本 🙂\n\n  "
    inside = "a " + " b ".join(special) + " c"
    return [
        Conversation("one turn", (user,), ordinary=True),
        Conversation("a system prompt", (system, user), ordinary=True),
        Conversation("several turns", (user, answer, again), ordinary=True),
        Conversation("an answer at the end", (user, answer), ordinary=True),
        Conversation("an empty system prompt", (_says("system", ""), user)),
        Conversation("definitions of tools", (user,), tuple(TOOLS)),
        Conversation("a tool call and its result", (user, called, result), tuple(TOOLS)),
        Conversation("special characters", (_says("user", odd), _says("assistant", odd), _says("user", odd))),
        Conversation("special tokens in the content", (_says("user", inside),)),
    ]


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, generation_prompt: bool, **variables: Any
) -> str:
    """Returns the text that transformers makes of a conversation.

    variables   `chat_template`, for another template than the tokenizer's, and variables that the template sees

    Raises as `chat_template.rendered`.
    """
    tools = copy.deepcopy(list(conversation.tools)) or None
    return rendered(tokenizer, conversation.messages, tools=tools, add_generation_prompt=generation_prompt, **variables)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the token ids of a rendered conversation, whose template has written all special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of the tokens that ordinary text is never split into: special tokens, and added ones."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> list[str]:
    """Returns the texts of tokens; [number] for one that the tokenizer does not have."""
    ids = list(tokens)
    texts = tokenizer.convert_ids_to_tokens(ids)
    return [f"[{number}]" if text is None else str(text) for number, text in zip(ids, texts, strict=True)]


def altered(conversation: Conversation) -> Conversation | None:
    """Returns the conversation with other contents of what a template may ignore; None for one that has none of it.

    That is the system prompt, the call of a tool and its result, or else the definitions of tools.
    """
    messages, tools = copy.deepcopy((conversation.messages, conversation.tools))
    concerned = [message for message in messages if message["role"] in ("system", "tool") or "tool_calls" in message]
    for message in concerned:
        message["content"] += " Otherwise."
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"]["days"] = 3
    if not concerned:
        for tool in tools:
            tool["function"]["name"] = "get_time"
    return replace(conversation, messages=messages, tools=tools) if concerned or tools else None
