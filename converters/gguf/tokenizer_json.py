"""Makes the tokenizer files of a model folder from the metadata of a GGUF file.

It is the way back from `vocabulary.py`: the tokenizer that transformers loads from these files makes the tokens that
llama.cpp makes with the GGUF file. llama.cpp's defaults for keys that are not there are those of its
`src/llama-vocab.cpp`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from lqexport.converters.gguf.pretokenizers import SPLITTERS, Splitter, splitter_named
from lqexport.converters.gguf.tokenizer import NEVER_STRIPPED, PHI_3
from lqexport.converters.gguf.tokens import SPACE

_ROLES = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
}
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of tokenizer.json. Raises ValueError, KeyError or TypeError if it is damaged or unknown."""
    model = metadata.get(Keys.Tokenizer.MODEL)
    make = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram, "bert": _wordpiece}.get(str(model))
    if make is None:
        raise ValueError(f"its model {model!r} is none of gpt2, llama, t5 and bert")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(metadata),
        **make(metadata),
        "post_processor": _ends(metadata),
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json: the special tokens, and whether texts get BOS and EOS."""
    texts = _texts(metadata)
    names = {f"{role}_token": texts[number] for role, number in special_ids(metadata).items()}
    bos, eos = adds(metadata)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bos,
        "add_eos_token": eos,
        **names,
    }


def template_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns file name -> text of the chat templates, as a Hugging Face folder has them."""
    named = {
        f"additional_chat_templates/{Path(name).name}.jinja": str(metadata.get(f"tokenizer.chat_template.{name}", ""))
        for name in metadata.get(Keys.Tokenizer.CHAT_TEMPLATES, [])
    }
    default = metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
    return named if default is None else {"chat_template.jinja": str(default)} | named


def is_splitter_known(metadata: Mapping[str, Any]) -> bool:
    """Returns whether the file's word splitter is one of `pretokenizers.SPLITTERS`, or it needs none."""
    return metadata.get(Keys.Tokenizer.MODEL) != "gpt2" or _splitter(metadata) is not None


def _texts(metadata: Mapping[str, Any]) -> list[str]:
    texts = metadata[Keys.Tokenizer.LIST]
    if not isinstance(texts, list) or not texts or len(set(texts)) != len(texts):
        raise ValueError("its list of tokens is empty, or two tokens have the same text")
    return texts


def _types(metadata: Mapping[str, Any]) -> list[int]:
    texts = _texts(metadata)
    types = metadata.get(Keys.Tokenizer.TOKEN_TYPE) or [int(TokenType.NORMAL)] * len(texts)
    if len(types) < len(texts):
        raise ValueError("some of its tokens have no type")
    return list(types)


def _scores(metadata: Mapping[str, Any]) -> list[float]:
    scores, count = metadata[Keys.Tokenizer.SCORES], len(_texts(metadata))
    if len(scores) < count:
        raise ValueError("some of its tokens have no score")
    return [float(score) for score in scores[:count]]


def _splitter(metadata: Mapping[str, Any]) -> Splitter | None:
    return splitter_named(str(metadata.get(Keys.Tokenizer.PRE, "default")))


def _added(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the tokens that are looked for in a text before it is split."""
    flags = dict.fromkeys(("single_word", "lstrip", "normalized"), False)
    looked_for = (*_SPECIAL, TokenType.USER_DEFINED)
    strips = PHI_3.search(str(metadata.get(Keys.General.NAME, ""))) is not None
    return [
        {"id": number, "content": text, **flags, "special": token_type in _SPECIAL}
        | {"rstrip": strips and text not in NEVER_STRIPPED}
        for number, (text, token_type) in enumerate(zip(_texts(metadata), _types(metadata), strict=False))
        if token_type in looked_for and text
    ]


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Returns role -> id of a special token. Ids beyond the vocabulary do not count, as in llama.cpp."""
    ids = dict(_SENTENCEPIECE_IDS) if metadata.get(Keys.Tokenizer.MODEL) == "llama" else {}
    ids |= {role: metadata[key] for role, key in _ROLES.items() if key in metadata}
    count = len(_texts(metadata))
    ids = {role: number for role, number in ids.items() if isinstance(number, int) and 0 <= number < count}
    if metadata.get(Keys.Tokenizer.MODEL) == "bert" and "bos" in ids:
        ids["cls"] = ids.pop("bos")  # llama.cpp's BOS is BERT's CLS
    return ids


def adds(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """Returns whether llama.cpp puts BOS before a text, and whether it puts EOS behind it.

    It has defaults where the file has no such key.
    """
    model, splitter = metadata.get(Keys.Tokenizer.MODEL), _splitter(metadata)
    by_default = model == "llama" or (model == "gpt2" and splitter is not None and splitter.adds_bos)
    bos, eos = metadata.get(Keys.Tokenizer.ADD_BOS, by_default), metadata.get(Keys.Tokenizer.ADD_EOS, model == "t5")
    return bool(bos), bool(eos)


def _ends(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the post-processor that puts special tokens around a text, or None."""
    texts, ids = _texts(metadata), special_ids(metadata)
    if metadata.get(Keys.Tokenizer.MODEL) == "bert":
        before, after = ids.get("cls"), ids.get("sep")
    else:
        bos, eos = adds(metadata)
        before, after = ids.get("bos") if bos else None, ids.get("eos") if eos else None
    if before is None and after is None:
        return None

    def around(*sequences: dict[str, Any]) -> list[dict[str, Any]]:
        ends = [
            [] if number is None else [{"SpecialToken": {"id": texts[number], "type_id": 0}}]
            for number in (before, after)
        ]
        return [*ends[0], *sequences, *ends[1]]

    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": around(first),
        "pair": around(first, second),
        "special_tokens": {
            texts[number]: {"id": texts[number], "ids": [number], "tokens": [texts[number]]}
            for number in (before, after)
            if number is not None
        },
    }


def _byte_level(metadata: Mapping[str, Any]) -> dict[str, Any]:
    splitter = _splitter(metadata) or SPLITTERS[0]
    vocabulary = {text: number for number, text in enumerate(_texts(metadata))}
    pairs = [_pair(merge) for merge in metadata[Keys.Tokenizer.MERGES]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in splitter.expressions
    ]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": splitter.ignore_merges,
            "vocab": vocabulary,
            # llama.cpp keeps pairs that join to no token, and makes their bytes of them again
            "merges": [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()],
        },
    }


def _pair(merge: str) -> tuple[str, str]:
    """Returns the two parts of a merge `left right`; the left one may begin with a space."""
    cut = merge.find(" ", 1)
    return merge[:cut], merge[cut + 1 :]


def _sentencepiece(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a BPE whose merges are in the order of the scores: that of the token that they make."""
    texts, types, scores = _texts(metadata), _types(metadata), _scores(metadata)
    vocabulary = {text: number for number, text in enumerate(texts)}
    normal = [number for number, token_type in enumerate(types[: len(texts)]) if token_type == TokenType.NORMAL]
    parts = {texts[number] for number in normal}
    merges = []
    for number in sorted(normal, key=lambda number: (-scores[number], number)):
        text = texts[number]
        cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [pair for pair in cuts if pair[0] in parts and pair[1] in parts]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if metadata.get(Keys.Tokenizer.ADD_PREFIX, True) else []
    visible = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = special_ids(metadata).get("unk")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [visible, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else texts[unknown],
            "fuse_unk": True,
            "byte_fallback": TokenType.BYTE in types,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _unigram(metadata: Mapping[str, Any]) -> dict[str, Any]:
    texts, types = _texts(metadata), _types(metadata)
    unknown = special_ids(metadata).get("unk", types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else None)
    steps: list[dict[str, Any]] = []
    if charsmap := bytes(byte & 255 for byte in metadata.get(Keys.Tokenizer.PRECOMPILED_CHARSMAP) or ()):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if metadata.get(Keys.Tokenizer.REMOVE_EXTRA_WS, False):
        steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE})
    scheme = "always" if metadata.get(Keys.Tokenizer.ADD_PREFIX, False) else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [list(pair) for pair in zip(texts, _scores(metadata), strict=True)],
            "byte_fallback": False,
        },
    }


def _wordpiece(metadata: Mapping[str, Any]) -> dict[str, Any]:
    texts, types = _texts(metadata), _types(metadata)
    vocabulary = {
        text if token_type != TokenType.NORMAL else text[1:] if text.startswith(SPACE) else f"##{text}": number
        for number, (text, token_type) in enumerate(zip(texts, types, strict=False))
    }
    unknown = special_ids(metadata).get("unk")
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]" if unknown is None else texts[unknown],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }
