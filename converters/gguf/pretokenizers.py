"""Which of llama.cpp's built-in word splitters a tokenizer.json asks for (`tokenizer.ggml.pre`).

A byte-level BPE tokenizer first cuts text into words by regular expressions. llama.cpp has those built in under names,
so the name is found by the expressions themselves, and by `ignore_merges`, which the name implies as well. A test
builds a tokenizer for every entry and compares its tokens with llama.cpp's.
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
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
    # llama.cpp leaves out the third; no token of such a tokenizer goes over what it would split.
    ((_PUNCTUATION, _GPT2, _DIGITS, "[0-9][0-9][0-9]"), False): "falcon",
}
"""(expressions one after the other, ignore_merges) -> llama.cpp's name."""


def pretokenizer_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the splitter of a tokenizer.json.

    Raises UserError where llama.cpp has none that is known to be the same, saying what the user can do.
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
    """The regular expressions by which a pre-tokenizer splits, in order; what is not one appears by its type."""
    kind = (step or {}).get("type")
    if step is None or kind is None:
        return ()
    if kind == "Sequence":
        return tuple(found for part in step["pretokenizers"] for found in _expressions(part))
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return (_GPT2,) if step.get("use_regex", True) else ()
    if kind == "Digits":
        return (_DIGIT if step.get("individual_digits") else _DIGITS,)
    if kind == "Punctuation" and step.get("behavior") == "Contiguous":
        return (_PUNCTUATION,)
    pattern = step.get("pattern") or {}
    # Isolated keeps matches and what lies between; Removed and inverted keeps matches, and these match everything.
    how = (step.get("behavior"), bool(step.get("invert", False)))
    if kind == "Split" and "Regex" in pattern and how in (("Isolated", False), ("Removed", True)):
        return (pattern["Regex"],)
    return (f"({kind})",)
