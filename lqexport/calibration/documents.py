"""Documents of a text to calibrate on: plain text, or a conversation that goes through the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lqexport.errors import UserError
from lqexport.models.chat_template import rendered

Message = dict[str, Any]
Document = str | tuple[Message, ...]
"""A text, or the messages of a conversation, each with a "role" and its "content"."""

DATE = {
    "%Y": "2025",
    "%m": "01",
    "%d": "15",
    "%B": "January",
    "%b": "Jan",
    "%A": "Wednesday",
    "%a": "Wed",
    **dict.fromkeys(("%H", "%M", "%S"), "12"),
}
"""What a template sees in place of today's date: equal runs shall see equal tokens on every day."""
_REPLACED = " | ".join(["format", *(f"replace({part!r}, {value!r})" for part, value in DATE.items())])
_FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ {_REPLACED} }}}}{{%- endmacro -%}}"


HALF = "it holds half of a surrogate pair, as of an emoji that was cut in two, which is no character"
"""The reason why a text of JSON is refused that `is_whole` is false of."""


def numbered_lines(content: str) -> Iterator[tuple[int, str]]:
    """Yields the number, counted from 1, and the text of each line of JSON Lines that is not blank.

    Not those of str.splitlines: it would also split at other line separators, such as U+2028, which JSON strings may
    hold.
    """
    return ((number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip())


def is_whole(text: str) -> bool:
    """Returns whether a text has characters alone: JSON may hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_document(line: str) -> Document | None:
    """Returns the document of a line of JSON Lines, from its "text" or its "messages"; None if it has neither."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    text, messages = fields.get("text"), fields.get("messages")
    if isinstance(text, str):
        return text
    return tuple(messages) if isinstance(messages, list) and messages and all(map(_is_message, messages)) else None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def plain(document: Document) -> str:
    """Returns a document as text that belongs to no model: a conversation with the name of each role."""
    if isinstance(document, str):
        return document
    return "\n\n".join(f"{message['role'].title()}: {message['content']}" for message in document)


def as_seen_by(tokenizer: Any, document: Document) -> str:
    """Returns a document as a model sees it: a conversation in the chat template of the model's tokenizer.

    Some templates refuse a system message: then it stands at the head of the first message after it. A conversation
    that the template refuses still, and any conversation without a template, is `plain`. Raises UserError if the
    template does not come to an end.
    """
    if isinstance(document, str) or not tokenizer.chat_template:
        return plain(document)
    for messages in (document, _without_system(document)):
        try:
            return rendered(tokenizer, messages, chat_template=_FIXED_DATE + tokenizer.get_chat_template())
        except TimeoutError as error:
            raise UserError(f"The model's chat template does not come to an end: {error}. Mend it.") from error
        except Exception:  # a template is a program from elsewhere, and raises what it likes
            continue
    return plain(document)


def is_spelled(tokenizer: Any, document: Document) -> bool:
    """Returns whether a tokenizer spells a document in bytes: it makes more tokens of it than it has characters.

    The model was then hardly trained on the language.
    """
    text = plain(document)
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) > len(text)


def _without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Returns the messages with a system message put before the content of the next one."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return messages
    first, second, *others = messages
    return ({**second, "content": f"{first['content']}\n\n{second['content']}"}, *others)
