"""The tokenizer and the chat templates of a model folder, as metadata of a GGUF file. Reads files only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys

from lqexport.converters.gguf.metadata import optional_json
from lqexport.converters.gguf.tokens import Vocabulary
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError, well_formed

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask", "cls")


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Vocabulary, special tokens and chat templates from the files in `folder`.

    size   rows of the embedding: the file gets exactly as many tokens

    Raises UserError where a file is missing or damaged, or where llama.cpp has no such tokenizer.
    """
    with well_formed(f"The tokenizer in {folder}", "Copy or download its files again."):
        _add_tokenizer(writer, folder, size)


def _add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    vocabulary = read_vocabulary(folder)
    tokens = vocabulary.padded(size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.text for token in tokens])
    if vocabulary.model in ("llama", "t5"):
        writer.add_token_scores([token.score for token in tokens])
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(vocabulary.merge_spaces)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    writer.add_token_types([int(token.kind) for token in tokens])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    _add_special_tokens(writer, folder, vocabulary, size)
    _add_chat_templates(writer, chat_templates(folder))


def _add_special_tokens(writer: GGUFWriter, folder: Path, vocabulary: Vocabulary, size: int) -> None:
    ids = {kind: number for kind, number in special_ids(folder, vocabulary).items() if number < size}
    first = ids.pop("cls", None)
    if vocabulary.model == "bert" and first is not None:  # llama.cpp calls it BOS
        ids["bos"] = first
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "sep": writer.add_sep_token_id,
        "pad": writer.add_pad_token_id,
        "mask": writer.add_mask_token_id,
    }
    for kind, number in ids.items():
        add[kind](number)
    # Always written: some splitters' names imply a BOS.
    bos, eos = added_ends(folder, vocabulary)
    writer.add_add_bos_token(bos and "bos" in ids)
    writer.add_add_eos_token(eos and "eos" in ids)


def special_ids(folder: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """bos, eos, unk, sep, pad, mask, cls -> token id: by the text that the tokenizer's files name, else by the number
    in config.json or generation_config.json, else (unk) by the kind of token."""
    files = [optional_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    configs = [optional_json(folder / name) for name in ("config.json", "generation_config.json")]
    found = {}
    for kind in _SPECIAL:
        texts = [_text(file.get(f"{kind}_token")) for file in files]
        by_text = [vocabulary.id_of(text) for text in texts if text]
        by_number = [_first(config.get(f"{kind}_token_id")) for config in configs]
        if (number := next((i for i in (*by_text, *by_number) if i is not None), None)) is not None:
            found[kind] = number
    if vocabulary.unknown is not None:
        found.setdefault("unk", vocabulary.unknown)
    return found


def _text(token: Any) -> str | None:
    """A token of the tokenizer's files: its text, or an object with the text as `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _first(ids: Any) -> int | None:
    """A token id of config.json: a number, or a list of them (end of text, end of turn)."""
    number = ids[0] if isinstance(ids, list) and ids else ids
    return number if isinstance(number, int) and number >= 0 else None


def added_ends(folder: Path, vocabulary: Vocabulary) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after every text.

    tokenizer_config.json decides where it says so, as in transformers, then the template in tokenizer.json, then
    the default of SentencePiece models in Llama: BOS and no EOS.
    """
    options, tokenizer = (
        optional_json(folder / "tokenizer_config.json"),
        optional_json(folder / "tokenizer.json"),
    )
    template = _template(tokenizer.get("post_processor") or {})
    default = (not tokenizer and vocabulary.model == "llama", False)
    by_template = ("SpecialToken" in template[0], "SpecialToken" in template[-1]) if template else default
    said = (options.get("add_bos_token"), options.get("add_eos_token"))
    bos, eos = (flag if isinstance(flag, bool) else found for flag, found in zip(said, by_template, strict=True))
    return bos, eos


def _template(processor: dict[str, Any]) -> list[dict[str, Any]]:
    """What is put around a single text, [] where nothing is: `[{"SpecialToken": ...}, {"Sequence": ...}]`."""
    for step in (processor, *processor.get("processors", ())):
        if step.get("type") == "TemplateProcessing":
            return list(step["single"])
    return []


def chat_templates(folder: Path) -> dict[str, str]:
    """Name -> Jinja text, the default one under `default`, from the newest place that has any: chat_template.jinja
    with additional_chat_templates/, chat_template.json, tokenizer_config.json. Raises UserError for another form."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        files = {"default": default} | files
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    for name in ("chat_template.json", "tokenizer_config.json"):
        content = optional_json(folder / name).get("chat_template")
        if isinstance(content, str):
            return {"default": content}
        if isinstance(content, list):
            return _named(folder / name, content)
    return {}


def _add_chat_templates(writer: GGUFWriter, templates: dict[str, str]) -> None:
    """Not gguf-py's `add_chat_template`: it lists the names in an order that changes from run to run. As there, what is
    no letter or digit of a name becomes `_`."""
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in templates.items() if name != "default"}
    for name, text in others.items():
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text)
    if others:
        writer.add_array(Keys.Tokenizer.CHAT_TEMPLATES, list(others))
    if "default" in templates:
        writer.add_string(Keys.Tokenizer.CHAT_TEMPLATE, templates["default"])


def _named(path: Path, templates: list[Any]) -> dict[str, str]:
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in templates}
    except (KeyError, TypeError):
        raise UserError(f"{path}: every entry of chat_template needs a name and a template.") from None
