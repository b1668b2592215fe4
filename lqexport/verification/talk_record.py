"""The record of how a file talks: its chat template, its stop tokens, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from lqexport.storage.published import public_sentence

Renderer = Literal["transformers", "llama.cpp"]
"""What renders the file's chat template."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as the file's chat template renders it, beside the source's.

    generation_prompt   whether the rendering ends where the model's answer begins
    same                whether both are the same tokens
    ordinary            whether every engine should render it as transformers does
    source, file        both around the first difference; "" where there is none
    note                how the engine differs on purpose; "" if it does not
    """

    conversation: str
    generation_prompt: bool
    renderer: Renderer
    same: bool
    ordinary: bool
    source: str = ""
    file: str = ""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.conversation} {'with' if self.generation_prompt else 'without'} a generation prompt"


@dataclass(frozen=True)
class StopToken:
    """A token that ends an answer of the source.

    in_file      whether the file's metadata or generation_config.json has it as a stop token
    stops        whether llama.cpp stops at it; None if that was not tried
    ends_turn    whether the source's chat template ends an answer with it
    """

    id: int
    text: str
    in_file: bool
    stops: bool | None
    ends_turn: bool


@dataclass(frozen=True)
class Continuation:
    """The texts of source and file after the same prompt, by the likeliest token each time.

    source, file      the texts; the source's ends early if it differs too often (`lqexport.verification.continuations`)
    tokens            number of the file's tokens
    difference        index of the first token that differs; None if all are the same
    source_says, file_says   the tokens there
    probability, file_probability   the source's probabilities of the two
    least_kl          the least KL(source || file) with which the file prefers its token there, in nats
    ended             whether the file's text ended at a stop token
    """

    prompt: str
    source: str
    file: str
    tokens: int
    difference: int | None
    source_says: str = ""
    file_says: str = ""
    probability: float = 0.0
    file_probability: float = 0.0
    least_kl: float = 0.0
    ended: bool = False


@dataclass
class Talk:
    """How a file talks, compared with its source.

    template       sentence about the chat template's text
    left_out       one sentence for each conversation that was not rendered
    not_checked    one sentence for each check that could not be made
    log            what llama.cpp's server printed last
    """

    template: str = ""
    renderings: list[Rendering] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    stops: list[StopToken] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    log: str = ""

    def published(self, names: dict[str, str]) -> Talk:
        """Returns the record with public names in the log, which has paths (`public_sentence`)."""
        return replace(self, log="\n".join(public_sentence(line, names) for line in self.log.splitlines()))
