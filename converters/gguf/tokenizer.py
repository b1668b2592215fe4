"""Writes the tokenizer and the chat templates of a model folder into the metadata of a GGUF file.

It reads the folder's files and runs no tokenizer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, TokenType

from lqexport.converters.gguf.added_tokens import ROLES, text_of
from lqexport.converters.gguf.file import write_metadata
from lqexport.converters.gguf.tokens import Vocabulary
from lqexport.converters.gguf.vocabulary import read_vocabulary
from lqexport.errors import UserError, well_formed
from lqexport.storage.files import optional_json

PHI_3, NEVER_STRIPPED = re.compile("(phi)-?3", re.IGNORECASE), ("<unk>", "<s>", "<|endoftext|>")


def add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Adds the vocabulary, special tokens and chat templates of the files in `folder` to `writer`.

    size   number of rows of the embedding; the GGUF file gets exactly as many tokens

    Raises UserError if a file is missing or damaged, or if llama.cpp has no such tokenizer.
    """
    with well_formed(f"The tokenizer in {folder}", "Copy or download its files again."):
        _add_tokenizer(writer, folder, size)


def write_vocabulary(folder: Path, path: Path, size: int, name: str = "") -> None:
    """Writes the tokenizer of a model folder as a GGUF file without tensors, which llama.cpp can load for it alone.

    size   number of rows of the embedding
    name   the model's name, by which llama.cpp knows some tokens that swallow spaces

    Raises UserError as `add_tokenizer` does.
    """
    writer = GGUFWriter(None, "llama")
    writer.add_name(name)
    add_tokenizer(writer, folder, size)
    write_metadata(writer, path)


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
    writer.add_token_types([int(token.token_type) for token in tokens])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    _add_special_tokens(writer, folder, vocabulary, size)
    _add_chat_templates(writer, chat_templates(folder))


def _add_special_tokens(writer: GGUFWriter, folder: Path, vocabulary: Vocabulary, size: int) -> None:
    ids = {role: number for role, number in special_ids(folder, vocabulary).items() if number < size}
    first = ids.pop("cls", None)
    if vocabulary.model == "bert" and first is not None:  # llama.cpp's BOS is BERT's CLS
        ids["bos"] = first
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "sep": writer.add_sep_token_id,
        "pad": writer.add_pad_token_id,
        "mask": writer.add_mask_token_id,
    }
    for role, number in ids.items():
        add[role](number)
    others = [number for number in stop_ids(folder, vocabulary) if number < size and number != ids.get("eos")]
    for add_other, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add_other(number)
    # Written even if false: llama.cpp adds a BOS by default for some values of tokenizer.ggml.pre.
    bos, eos = added_ends(folder, vocabulary)
    writer.add_add_bos_token(bos and "bos" in ids)
    writer.add_add_eos_token(eos and "eos" in ids)


def special_ids(folder: Path, vocabulary: Vocabulary) -> dict[str, int]:
    """Returns role -> token id for the roles bos, eos, unk, sep, pad, mask and cls that the model has.

    The id is that of the text in the tokenizer's files, else the number in config.json or generation_config.json, else
    (for unk) the id of the token whose type is unknown.
    """
    files = [optional_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    configs = [optional_json(folder / name) for name in ("config.json", "generation_config.json")]
    ids = {}
    for role in ROLES:
        texts = [text_of(file.get(f"{role}_token")) for file in files]
        by_text = [vocabulary.id_of(text) for text in texts if text]
        by_number = [_first(config.get(f"{role}_token_id")) for config in configs]
        if (number := next((i for i in (*by_text, *by_number) if i is not None), None)) is not None:
            ids[role] = number
    if vocabulary.unknown is not None:
        ids.setdefault("unk", vocabulary.unknown)
    return ids


def stop_ids(folder: Path, vocabulary: Vocabulary) -> list[int]:
    """Returns the ids that end an answer, by the list in generation_config.json, else by that in config.json.

    Numbers that are no special or added token of the vocabulary are left out: some configs keep those of another model.
    """
    configs = [optional_json(folder / name) for name in ("generation_config.json", "config.json")]
    given: Any = next((ids for config in configs if (ids := config.get("eos_token_id")) is not None), [])
    added = {
        number
        for number, token in vocabulary.tokens.items()
        if token.token_type in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    return [number for number in (given if isinstance(given, list) else [given]) if number in added]


def name_for_llamacpp(name: str, folder: Path) -> str:
    """Returns the model's name, changed so that llama.cpp strips white space behind special tokens as the source does.

    llama.cpp has no key for that (`llama_vocab::impl::load`). If the name contains phi-3 or phi3 in any case, it strips
    behind all special tokens but <unk>, <s> and <|endoftext|>, and does not load a vocabulary that lacks one of these
    or </s>. Otherwise it strips behind none.
    """
    with well_formed(f"The tokenizer in {folder}", "Copy or download its files again."):
        added = optional_json(folder / "tokenizer.json").get("added_tokens") or ()
        concerned = [token for token in added if token.get("special") and token["content"] not in NEVER_STRIPPED]
        strips = 2 * sum(bool(token.get("rstrip")) for token in concerned) > len(concerned)
        loads = {*NEVER_STRIPPED, "</s>"} <= {token["content"] for token in added}
    if strips and loads:
        return name if PHI_3.search(name) else f"{name} (phi-3)".lstrip()
    return PHI_3.sub(r"\1 3", name)


def _first(ids: Any) -> int | None:
    """Returns the first token id of config.json's value: a number, or a list of them (end of text, end of turn)."""
    number = ids[0] if isinstance(ids, list) and ids else ids
    return number if isinstance(number, int) and number >= 0 else None


def added_ends(folder: Path, vocabulary: Vocabulary) -> tuple[bool, bool]:
    """Returns whether the tokenizer puts BOS before every text, and whether it puts EOS after every text.

    tokenizer_config.json decides if it has the keys, as in transformers; else the template in tokenizer.json; else the
    default of Llama's SentencePiece models: BOS and no EOS.
    """
    options, tokenizer = (
        optional_json(folder / "tokenizer_config.json"),
        optional_json(folder / "tokenizer.json"),
    )
    template = _template(tokenizer.get("post_processor") or {})
    default = (not tokenizer and vocabulary.model == "llama", False)
    by_template = ("SpecialToken" in template[0], "SpecialToken" in template[-1]) if template else default
    flags = (options.get("add_bos_token"), options.get("add_eos_token"))
    bos, eos = (flag if isinstance(flag, bool) else usual for flag, usual in zip(flags, by_template, strict=True))
    return bos, eos


def _template(processor: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the template of a single text, such as `[{"SpecialToken": ...}, {"Sequence": ...}]`, or []."""
    for step in (processor, *processor.get("processors", ())):
        if step.get("type") == "TemplateProcessing":
            return list(step["single"])
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):  # always [CLS] text [SEP], or <s> text </s>
            return [{"SpecialToken": {}}, {"Sequence": {}}, {"SpecialToken": {}}]
    return []


def chat_templates(folder: Path) -> dict[str, str]:
    """Returns name -> Jinja text of the folder's chat templates; the default one is called `default`.

    They are read from the first of these places that has any: chat_template.jinja with additional_chat_templates/,
    chat_template.json, tokenizer_config.json. Raises UserError if an entry has no name or no template.
    """
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("[!.]*.jinja"))}
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
    """Adds the chat templates; in a name, everything but ASCII letters and digits becomes `_`, as gguf-py does it.

    gguf-py's `add_chat_template` is not used: it lists the names in an order that changes from run to run.
    """
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
