"""Finds llama.cpp's name (`tokenizer.ggml.pre`) for the word splitter of a tokenizer.json.

A byte-level BPE tokenizer first cuts text into words by regular expressions. llama.cpp has a set of built-in splitters,
each with a name, which implies `ignore_merges` too. Several names mean the same splitter. A test builds a tokenizer for
every splitter and compares its tokens with llama.cpp's.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from lqexport.errors import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS, _THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CONTRACTED = tuple(cased + _CONTRACTIONS + "?" for cased in _CASED)
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_CHINESE_AND_JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"
_KOREAN_AND_PUNCTUATION = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CHINESE_AND_JAPANESE
_RUNS_OF_LINES = r"[^\n]+|[\n]+"
_LONG_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_HAN_UPPER, _HAN_LOWER = (f"[{letters[1:-1]}&&[^\\p{{Han}}]]" for letters in (_UPPER, _LOWER))


def _any(*expressions: str) -> str:
    return "|".join(expressions)


_LLAMA3 = _any(_CONTRACTIONS, _WORDS, _THREE_DIGITS, _SYMBOLS, _SPACES)
_QWEN2 = _any(_CONTRACTIONS, _WORDS, _DIGIT, _SYMBOLS, _SPACES)
_QWEN35 = _any(_CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", _DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES)
_SEED = _any(_CONTRACTIONS, _WORDS, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES)
_TEKKEN = _any(*_CASED, _DIGIT, _SYMBOLS_AND_SLASHES, _SPACES)
_GPT4O = _any(*_CONTRACTED, _THREE_DIGITS, _SYMBOLS_AND_SLASHES, _SPACES)
_YOUTU = _any(*_CONTRACTED, _DIGIT, _SYMBOLS_AND_SLASHES, _SPACES)
_JAIS2 = _any(_CONTRACTIONS, _WORDS, _THREE_DIGITS, _SYMBOLS, r"\s*[\r\n]+", _LONG_SPACES, r"\s{1}")
_MINICPM5 = _any(_CONTRACTIONS, _WORDS, _DIGITS, _SYMBOLS, _SPACES)
_EXAONE_MOE = _any(
    _CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", _DIGIT,
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+",
)  # fmt: skip
_BAILING = _any(
    "'(?i:[sdmt]|ll|ve|re)", _WORDS, _DIGIT, _SYMBOLS, r"\s*[\r\n]", r"\s+(?!\S)", r"\s+"
)  # fmt: skip
_KIMI = _any(
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HAN_UPPER}*{_HAN_LOWER}+{_CONTRACTIONS}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_HAN_UPPER}+{_HAN_LOWER}*{_CONTRACTIONS}?",
    _THREE_DIGITS, _SYMBOLS, _SPACES,
)  # fmt: skip
_DEEPSEEK = _any(
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    _SPACES,
)
_DEEPSEEK_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)  # fmt: skip
_DEEPSEEK_ASIAN = "[一-龥ࠀ-一가-\ud7ff]+"


@dataclass(frozen=True)
class Splitter:
    """A word splitter of llama.cpp.

    names           its names in llama.cpp, of which the first is written
    expressions     the regular expressions in the order in which they split, as tokenizer.json has them
    ignore_merges   whether a word that is a token is not merged from its parts
    adds_bos        whether texts get BOS by default
    either          whether `ignore_merges` of a tokenizer.json may have either value: its vocabularies come from
                    tiktoken, so merges make every token that is a word
    """

    names: tuple[str, ...]
    expressions: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False
    either: bool = False


SPLITTERS = (
    Splitter(
        ("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code",
         "roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion",
         "granite-docling"),
        (_GPT2,),
    ),
    Splitter(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (_DIGIT, _GPT2),
    ),
    Splitter(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        (_LLAMA3,), ignore_merges=True, adds_bos=True,
    ),
    Splitter(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    Splitter(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        (_QWEN2,),
    ),
    Splitter(("qwen35",), (_QWEN35,)),
    Splitter(("seed-coder",), (_SEED,)),
    Splitter(("tekken",), (_TEKKEN,), ignore_merges=True, adds_bos=True, either=True),
    Splitter(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), (_GPT4O,), either=True),
    Splitter(("granite-embed-multi-97m",), (_GPT4O,), ignore_merges=True),
    Splitter(("tiny_aya", "cohere2moe"), (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    Splitter(("deepseek-v3", "hunyuan-dense", "joyai-llm"), (_THREE_DIGITS, _CHINESE_AND_JAPANESE, _DEEPSEEK)),
    Splitter(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_ASIAN, _DIGIT)),
    Splitter(
        ("deepseek-llm",),
        # llama.cpp keeps runs of digits together: no token of such a tokenizer has two digits.
        (r"[\r\n]", rf"\s?[{_DEEPSEEK_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _DEEPSEEK_ASIAN, _DIGIT),
    ),
    # llama.cpp leaves out the third expression: no token of such a tokenizer crosses the splits that it would make.
    Splitter(("falcon",), (_PUNCTUATION, _GPT2, _DIGITS, "[0-9][0-9][0-9]")),
    Splitter(("bloom", "poro-chat", "gpt3-finnish"), (_BLOOM,)),
    Splitter(("viking",), (_BLOOM, _DIGIT)),
    Splitter(("jais-2",), (_JAIS2,)),
    Splitter(("youtu",), (_KOREAN_AND_PUNCTUATION, _YOUTU), ignore_merges=True, either=True),
    Splitter(("kimi-k2",), (_KIMI,), either=True),
    Splitter(("bailingmoe", "bailingmoe2", "llada-moe"), (_BAILING,)),
    Splitter(("superbpe",), (_DIGITS, r"(?=(\d{3})+(?!\d))")),
    Splitter(("ufakzeka",), (_any(_WORDS, _DIGIT, _SYMBOLS, _SPACES),)),
    Splitter(("laguna",), (_RUNS_OF_LINES, _QWEN2)),
    Splitter(("exaone-moe",), (_EXAONE_MOE,)),
    Splitter(("default",), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _DIGITS, "[0-9][0-9][0-9]")),
    Splitter(("minicpm5",), (_THREE_DIGITS, _MINICPM5), ignore_merges=True, either=True),
)  # fmt: skip


def pretokenizer_name(tokenizer: dict[str, Any]) -> str:
    """Returns llama.cpp's name for the word splitter of a tokenizer.json.

    Raises UserError, with advice, if no splitter of llama.cpp is known to do the same.
    """
    expressions = _expressions(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
    compared = tuple(map(_spelled, expressions))
    for splitter in SPLITTERS:
        same = compared == tuple(map(_spelled, splitter.expressions))
        if same and (splitter.either or splitter.ignore_merges == ignore_merges):
            return splitter.names[0]
    raise UserError(
        f"tokenizer.json splits words in a way that is not known to be one of llama.cpp's: {list(expressions)}"
        f"{' with ignore_merges' if ignore_merges else ''}. If llama.cpp has it, write its name into "
        'tokenizer_config.json as "tokenizer.ggml.pre" (for example "llama-bpe") and convert again.'
    )


def splitter_named(name: str) -> Splitter | None:
    """Returns llama.cpp's splitter of a name, or None if its expressions are not known here."""
    return next((splitter for splitter in SPLITTERS if name in splitter.names), None)


def _spelled(expression: str) -> str:
    """Returns a regular expression in one of the spellings that mean the same in the splitters above.

    Line breaks may be characters or escapes. A possessive repetition (`?+`, `++`, `*+`) matches what the greedy one
    does, since what follows it never begins with what it repeats.
    """
    composed = unicodedata.normalize("NFC", expression)  # of the signs for ohm and kelvin, and of accented Greek
    escaped = composed.replace("\r", r"\r").replace("\n", r"\n").replace(r"\/", "/")
    return re.sub(r"(?<!\\)([?+*])\+", r"\1", escaped)


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
