"""Reads texts to calibrate and to evaluate on: from the Hugging Face hub, a file, or Python's own documentation."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lqexport.calibration.documents import (
    HALF,
    Document,
    as_seen_by,
    is_spelled,
    is_whole,
    numbered_lines,
    parse_document,
    plain,
)
from lqexport.errors import UserError, install
from lqexport.runtime.hub import hub

# The source of these modules is in every Python from 3.10 on. No module is in both lists: held-out text must be new.
CALIBRATION_MODULES = (
    "argparse",
    "ast",
    "collections",
    "configparser",
    "_pydecimal",
    "difflib",
    "doctest",
    "email.message",
    "enum",
    "functools",
    "heapq",
    "inspect",
    "json.decoder",
    "logging",
    "optparse",
    "random",
    "statistics",
    "string",
    "textwrap",
    "threading",
)
HELDOUT_MODULES = (
    "asyncio.base_events",
    "bisect",
    "calendar",
    "concurrent.futures._base",
    "contextlib",
    "csv",
    "dataclasses",
    "datetime",
    "fractions",
    "gettext",
    "http.client",
    "ipaddress",
    "locale",
    "mailbox",
    "pathlib",
    "pickle",
    "pickletools",
    "shutil",
    "smtplib",
    "sqlite3",
    "subprocess",
    "tarfile",
    "tempfile",
    "trace",
    "turtle",
    "typing",
    "unittest.case",
    "unittest.mock",
    "urllib.request",
    "uuid",
    "xml.dom.minidom",
    "zipfile",
)

BETWEEN = "\n\n"
"""What stands between two documents of a text."""
JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of files of JSON Lines, in lower case."""
INSTEAD = "Give a local .txt or .jsonl file, or general, which needs no network."
"""What a user can do if a text of the hub is out of reach."""

CODE_MODULES = ("collections", "functools", "heapq", "textwrap")
HELDOUT_CODE_MODULES = ("bisect", "fractions")


@dataclass(frozen=True)
class HubText:
    """A data set of the Hugging Face hub that loads without a script of its own.

    path, name   arguments of `datasets.load_dataset`
    splits       the splits that exist; the plain name means the first one
    files        the data file of each split, if the data set is too large to take whole
    column       the column that holds the text
    limit        characters to read from a streamed split; 0 reads all, not streamed
    """

    path: str
    splits: tuple[str, ...]
    name: str | None = None
    files: dict[str, str] | None = None
    column: str = "text"
    limit: int = 0


PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", ("train", "validation", "test"), name="wikitext-2-raw-v1"),
    "c4": HubText(
        "allenai/c4",
        ("train", "validation"),
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        limit=8_000_000,
    ),
    "ptb": HubText(
        "parquet",
        ("train", "validation", "test"),
        files={split: PTB.format(split) for split in ("train", "validation", "test")},
        column="sentence",
    ),
}


class Text(NamedTuple):
    """A text, and the name or file that the user gave for it.

    documents   its parts, between which there are blank lines
    fitted      whether a model sees only the languages that its tokenizer has tokens for
    """

    name: str
    documents: tuple[Document, ...]
    fitted: bool = False

    @property
    def content(self) -> str:
        """The text for any model: conversations have the names of their roles."""
        return BETWEEN.join(map(plain, self.documents))

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def seen_by(self, tokenizer: Any) -> str:
        """Returns the text as a model with this tokenizer sees it: conversations are in its chat template."""
        known = [part for part in self.documents if not (self.fitted and is_spelled(tokenizer, part))]
        return BETWEEN.join(as_seen_by(tokenizer, document) for document in known or self.documents)


def read_text(name_or_file: str) -> Text:
    """Returns the text that `name_or_file` means.

    `general` is text of many sorts that was written for this program (docs/calibration.md). The other built-in names
    are the same for everyone who has the same Python version. `python-docs` is the language reference of `pydoc`, with
    docstrings and some code of the standard library. `python-heldout` is docstrings and code of other modules, to
    evaluate on.

    Names on the hub are `wikitext2`, `c4` and `ptb`, with an optional `:split`. Documents are joined by blank lines.

    Anything else is a file: JSON Lines with "text" or "messages" in every line, or plain text. JSON Lines are known by
    the suffix (.jsonl or .ndjson, in any case), or by their content, each line being a JSON object. The messages of a
    conversation have a "role" and a "content".

    Raises UserError if there is no such text or it cannot be read.
    """
    if name_or_file in BUILT_IN:
        return Text(name_or_file, BUILT_IN[name_or_file](), fitted=name_or_file == "general")
    if (path := Path(name_or_file)).is_file():
        return Text(name_or_file, _read_file(path))
    name, _, split = name_or_file.partition(":")
    if name in HUB_TEXTS:
        return Text(name_or_file, tuple(_read_hub(name, split, HUB_TEXTS[name])))
    raise _unknown(name_or_file)


def is_at_hand(name_or_file: str) -> bool:
    """Returns whether `read_text` finds the text on this machine; else it is on the hub, or there is none."""
    return name_or_file in BUILT_IN or Path(name_or_file).is_file()


def check_text(name_or_file: str) -> None:
    """Raises UserError if `read_text` will not find the text, or cannot read it.

    A file is read whole. Of a text on the hub only the name, the split and the package `datasets` are checked.
    """
    if name_or_file in BUILT_IN:
        return
    if (path := Path(name_or_file)).is_file():
        _read_file(path)
        return
    name, _, split = name_or_file.partition(":")
    if name not in HUB_TEXTS:
        raise _unknown(name_or_file)
    _known_split(name, split, HUB_TEXTS[name])
    if importlib.util.find_spec("datasets") is None:
        raise _no_datasets(name)


def _unknown(name_or_file: str) -> UserError:
    if Path(name_or_file).is_dir():
        return UserError(f"{name_or_file} is a folder. Give one of its files, .txt or .jsonl.")
    known = ", ".join([*BUILT_IN, *HUB_TEXTS])
    return UserError(f"There is no text file {name_or_file}, and no text of that name. Known names: {known}.")


def _read_file(path: Path) -> tuple[Document, ...]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    if path.suffix.lower() in JSON_LINES or _is_json_lines(content):
        return tuple(_jsonl_documents(path, content))
    if _is_json(content):
        raise UserError(
            f'{path} is JSON, and not text: give JSON Lines, a {{"text": "..."}} in every line, or plain text.'
        )
    return (content,)


def _is_json_lines(content: str) -> bool:
    """Returns whether every line that is not blank holds a JSON object, so that the text is not meant to be plain."""
    lines = [line for _, line in numbered_lines(content)]
    return bool(lines) and all(line.lstrip().startswith("{") and _is_json(line) for line in lines)


def _is_json(content: str) -> bool:
    """Returns whether a text is a JSON object or array as a whole."""
    try:
        return isinstance(json.loads(content), (dict, list))
    except (ValueError, RecursionError):
        return False


def _jsonl_documents(path: Path, content: str) -> Iterator[Document]:
    for number, line in numbered_lines(content):
        if (document := parse_document(line)) is None:
            raise UserError(
                f'{path}, line {number}: not a JSON object with a string "text", or with "messages" that each have a '
                'string "role" and a string "content".'
            )
        if not is_whole(plain(document)):
            raise UserError(f"{path}, line {number}: {HALF}. Mend or delete the line.")
        yield document


def documents(name_and_split: str, most: int | None) -> list[str]:
    """Returns the documents of a hub text such as `c4:validation`, at most `most`; None for all that its file holds.

    Raises UserError as `read_text` does.
    """
    name, _, split = name_and_split.partition(":")
    return _read_hub(name, split, dataclasses.replace(HUB_TEXTS[name], limit=0))[:most]


def _read_hub(name: str, split: str, text: HubText) -> list[str]:
    """Returns the documents of a split, up to the text's limit of characters."""
    split = _known_split(name, split, text)
    try:
        import datasets
    except ImportError:
        raise _no_datasets(name) from None
    with hub() as unreached, _quiet_hub():
        try:
            return list(_hub_documents(datasets.load_dataset, text, split))
        except Exception as error:  # whatever the hub's client raises: no network, no such file, a full disk
            said = str(error).strip().split("\n")[0]
            reason = unreached if unreached and isinstance(error, ConnectionError) else said
            raise UserError(f"The text {name} cannot be loaded from the hub: {reason} {INSTEAD}") from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keeps the hub's client from printing every try to reach the hub; what it raises in the end says enough."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _known_split(name: str, split: str, text: HubText) -> str:
    """Returns the split that is meant, the first one if none is named. Raises UserError if there is no such split."""
    split = split or text.splits[0]
    if split not in text.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(text.splits)}.")
    return split


def _no_datasets(name: str) -> UserError:
    return UserError(f"The text {name} needs the `datasets` package: {install('datasets')}. {INSTEAD}")


def _hub_documents(load_dataset: Callable[..., Any], text: HubText, split: str) -> Iterator[str]:
    """Yields the documents of a split, up to the first that reaches the limit of characters."""
    options: dict[str, Any] = {"streaming": text.limit > 0}
    if text.files is not None:
        options["data_files"] = {split: text.files[split]}
    characters = 0
    for row in load_dataset(text.path, text.name, split=split, **options):
        yield row[text.column]
        characters += len(row[text.column])
        if text.limit and characters >= text.limit:
            return


def _general() -> tuple[Document, ...]:
    return _read_file(Path(__file__).with_name("general.jsonl"))


def _python_docs() -> tuple[Document, ...]:
    """Returns the language reference that `help()` shows, then docstrings and a little code."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("This Python lacks pydoc_data, so it has no python-docs; give a text file instead.") from None
    parts = [topics[topic] for topic in sorted(topics)]
    parts += [_docstrings(module) for module in CALIBRATION_MODULES]
    parts += [_source(module) for module in CODE_MODULES]
    return tuple(parts)


def _python_heldout() -> tuple[Document, ...]:
    parts = [_docstrings(module) for module in HELDOUT_MODULES]
    parts += [_source(module) for module in HELDOUT_CODE_MODULES]
    return tuple(parts)


BUILT_IN: dict[str, Callable[[], tuple[Document, ...]]] = {
    "general": _general,
    "python-docs": _python_docs,
    "python-heldout": _python_heldout,
}


def _source(module: str) -> str:
    """Returns a standard module's source code; empty if this Python ships none."""
    spec = importlib.util.find_spec(module)
    source = getattr(spec.loader, "get_source", lambda _: None)(module) if spec else None
    return source or ""


def _docstrings(module: str) -> str:
    """Returns the docstrings of a standard module, its classes and its functions, in the order of the file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(_source(module))) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))
