"""Checks the chat templates in a file's metadata: that they parse, and that a model for chats has one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lqexport.checking.opened import OpenFile
from lqexport.checking.problems import Problem, error, warning

KEY = "tokenizer.chat_template"
FOR_CHATS = re.compile(r"(?<![a-z])(instruct|chat|it)(?![a-z])", re.IGNORECASE)
"""Matches a word by which the name of a model says that it is for chats."""


class _Generation(Extension):
    """Parses transformers' `{% generation %}`, which marks what the model says."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_templates(file: OpenFile) -> Iterator[Problem]:
    """Yields templates that do not parse, and a warning for a model whose name says chat and that has none."""
    templates = {key: value for key, value in file.metadata.items() if _is_template(key)}
    for key, value in templates.items():
        if message := template_fault(value):
            yield error("template", f"{key} {message}.")
    names = {file.path.stem, *(str(file.metadata.get(f"general.{key}", "")) for key in ("name", "finetune"))}
    if not templates and (said := [name for name in sorted(names) if FOR_CHATS.search(name)]):
        yield warning("template", f"The model is called {said[0]!r} and has no chat template.")


def _is_template(key: str) -> bool:
    return key == KEY or key.startswith(f"{KEY}.")


def template_fault(template: Any) -> str | None:
    """Returns what is wrong with a template, as the rest of a sentence; None if it parses."""
    if not isinstance(template, str) or not template.strip():
        return "is empty or not a text"
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        environment.parse(template)
    except TemplateSyntaxError as problem:
        return f"does not parse: line {problem.lineno}: {problem.message}"
    except RecursionError:
        return "does not parse: it is nested too deep"
    return None
