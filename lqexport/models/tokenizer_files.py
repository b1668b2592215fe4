"""Loads the tokenizer of a folder, and writes the tokenizer of a GGUF file as the files of a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqexport.converters.gguf.header import read_header
from lqexport.converters.gguf.tokenizer import write_vocabulary
from lqexport.converters.gguf.tokenizer_json import template_files, tokenizer_config, tokenizer_json
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError, well_formed
from lqexport.storage.files import write_json, written_whole
from lqexport.storage.stand_ins import stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""The files of which a tokenizer has at least one."""


def load_tokenizer(folder: Path, source: Path | None = None) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in a folder. Raises UserError if there is none or it cannot be loaded.

    A tokenizer.model alone is read here: transformers needs the package protobuf for it, and with that leaves out the
    token that begins a text and the space before it, which sentencepiece does not.

    source   the file that the folder was made from, for the message
    """
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return _of_sentencepiece(folder)
    from transformers import AutoTokenizer  # takes a second, which those who need no tokenizer do not wait for

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        if source is None and not any((folder / name).is_file() for name in VOCABULARIES):
            reason = f"there is none of {', '.join(VOCABULARIES)}. Copy these files of the model there"
        elif stands_in := next(filter(None, (stand_in(folder / name) for name in VOCABULARIES)), None):
            reason = stands_in
        raise UserError(f"The tokenizer in {source or folder} cannot be loaded: {reason.rstrip('.')}.") from error


def _of_sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder with a tokenizer.model, as a GGUF file would hold it."""
    size = max(read_vocabulary(folder).tokens) + 1
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "vocabulary.gguf"
        write_vocabulary(folder, path, size)
        write_tokenizer(read_header(path)[0], Path(temporary), folder)
        return load_tokenizer(Path(temporary), folder)


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, source: Path) -> None:
    """Writes the tokenizer and the chat templates in a GGUF file's metadata as files of a Hugging Face folder.

    source   the GGUF file, for messages

    Raises UserError if the metadata is malformed.
    """
    with well_formed(f"The tokenizer in {source}"):
        write_json(folder / "tokenizer.json", tokenizer_json(metadata))
        write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    with well_formed(f"{source}: tokenizer.chat_templates"):
        for file_name, text in template_files(metadata).items():
            with written_whole(folder / file_name) as file:
                file.write(text.encode())
