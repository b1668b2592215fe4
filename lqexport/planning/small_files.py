"""Checks the small files that a written model takes over from its source, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lqexport.checking.templates import template_fault
from lqexport.converters.gguf.tokenizer import chat_templates
from lqexport.errors import UserError, well_formed
from lqexport.storage.files import inside, read_json

OBJECTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
"""Files that hold a JSON object where a model has them."""
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja")
ENDS = ("bos_token_id", "eos_token_id")
"""Keys of generation_config.json whose ids begin or end a text, so the model needs them."""
MEND = "Mend the file, or copy or download it again."


def check_small_files(folder: Path, rows: int) -> None:
    """Raises UserError if a small file of a model folder is damaged: all targets' readers stumble over it.

    rows   number of rows of the embedding, above the ids of all tokens

    The JSON files must hold objects, generation_config.json ids of tokens, and every chat template must parse.
    """
    for path in (path for pattern in (*OBJECTS, *TEMPLATES) for path in folder.glob(pattern)):
        inside(folder, path)
    contents = {name: read_json(folder / name, "") for name in OBJECTS if (folder / name).is_file()}
    _check_ids(folder / "generation_config.json", contents.get("generation_config.json", {}), rows)
    with well_formed(f"A chat template of {folder}", MEND):
        templates = chat_templates(folder)
    for name, text in templates.items():
        if text.strip() and (fault := template_fault(text)):
            raise UserError(f"The chat template {name!r} of {folder} {fault}. {MEND}")


def _check_ids(path: Path, generation: dict[str, Any], rows: int) -> None:
    """Raises UserError if a token id of generation_config.json is no number, or one of `ENDS` has no row."""
    for key in (*ENDS, "pad_token_id"):
        value = generation.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise UserError(f"{path}: {key} is {number!r}, not the id of a token. {MEND}")
            if number is not None and key in ENDS and not 0 <= number < rows:
                raise UserError(
                    f"{path}: {key} has {number}, and the embedding has {rows} rows, from 0 on: the model cannot read "
                    f"or write that token. {MEND}"
                )
