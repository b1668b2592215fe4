"""Finds llama.cpp's name (`tokenizer.ggml.pre`) for the word splitter of a tokenizer.json.

A byte-level BPE tokenizer first cuts text into words by regular expressions. llama.cpp has a set of built-in splitters,
each with a name. The table here gives the name for the expressions and for `ignore_merges`, which the name implies
too. A test builds a tokenizer for every entry and compares its tokens with llama.cpp's.
"""

from __future__ import annotations

from typing import Any

from lqexport.errors import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _SYMBOLS, _SPACES])
_QWEN2 = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}", _SYMBOLS, _SPACES])
_SEED = "|".join([_CONTRACTIONS, _WORDS, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES])
_TEKKEN = "|".join([*_CASED, r"\p{N}", _SYMBOLS_AND_SLASHES, _SPACES])
_GPT4O = "|".join([*(cased + _CONTRACTIONS + "?" for cased in _CASED), r"\p{N}{1,3}", _SYMBOLS_AND_SLASHES, _SPACES])

_DEEPSEEK = "|".join(
    [
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    ]
)

PRETOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_SEED,), False): "seed-coder",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
    # llama.cpp leaves out the third expression: no token of such a tokenizer crosses the splits that it would make.
    ((_PUNCTUATION, _GPT2, _DIGITS, "[0-9][0-9][0-9]"), False): "falcon",
}
"""(expressions in the order in which they split, ignore_merges) -> llama.cpp's name."""


def pretokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Returns llama.cpp's name for the word splitter of a tokenizer.json.

    Raises UserError, with advice, if no splitter of llama.cpp is known to do the same.
    """
    expressions = _expressions(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    name = PRETOKENIZERS.get((expressions, ignore_merges))
    if name is None:
        raise UserError(
            f"tokenizer.json splits words in a way that is not known to be one of llama.cpp's: {list(expressions)}"
            f"{' with ignore_merges' if ignore_merges else ''}. If llama.cpp has it, write its name into "
            'tokenizer_config.json as "tokenizer.ggml.pre" (for example "llama-bpe") and convert again.'
        )
    return name


def _expressions(step: dict[str, Any] | None) -> tuple[str, ...]:
    """Returns the regular expressions by which a pre-tokenizer splits, in their order.

    A step that does not split by a regular expression appears as its type in parentheses.
    """
    step_type = (step or {}).get("type")
    if step is None or step_type is None:
        return ()
    if step_type == "Sequence":
        return tuple(expression for inner in step["pretokenizers"] for expression in _expressions(inner))
    if step_type == "ByteLevel" and not step.get("add_prefix_space", True):
        return (_GPT2,) if step.get("use_regex", True) else ()
    if step_type == "Digits":
        return (_DIGIT if step.get("individual_digits") else _DIGITS,)
    if step_type == "Punctuation" and step.get("behavior") == "Contiguous":
        return (_PUNCTUATION,)
    pattern = step.get("pattern") or {}
    # "Isolated" keeps the matches and the text between them. "Removed" with invert keeps the matches alone, which is
    # the same here, since these expressions match all of a text.
    behavior = (step.get("behavior"), bool(step.get("invert", False)))
    if step_type == "Split" and "Regex" in pattern and behavior in (("Isolated", False), ("Removed", True)):
        return (pattern["Regex"],)
    return (f"({step_type})",)
