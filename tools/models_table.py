"""Prints the table of docs/models.md: the table of architectures, the test cases of each family, and what is refused.

python tools/models_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import ARCHITECTURES
from lqexport.converters.models.refused import REFUSED

ROOT = Path(__file__).resolve().parent.parent
ENCODERS = {"bert": "test_encoders.py", "gemma-embedding": "test_embedding_gemma.py"}
"""GGUF architecture of an encoder -> the file with its tests."""
COLUMNS = ("family", "`architectures`", "GGUF as", "rope scaling in GGUF", "windows in GGUF", "EXL2", "tried with")


def tested() -> dict[str, list[str]]:
    """Returns family -> its cases in tests/helpers/family_cases.py, with the number of configs that lack a key.

    The configs are in the styles of transformers 4 and 5.
    """
    helpers = str(ROOT / "tests" / "helpers")
    sys.path += [] if helpers in sys.path else [helpers]
    from config_variations import configs_without_a_key
    from family_cases import CASES, architecture_of_case

    cases: dict[str, list[str]] = {}
    for name in CASES:
        count = sum(1 for _ in configs_without_a_key(name))
        cases.setdefault(architecture_of_case(name).family, []).append(f"{name} ({count})")
    return cases


def table(cases: dict[str, list[str]]) -> str:
    """Returns the table in Markdown. `cases` is what `tested` returns."""
    rows = [
        COLUMNS,
        tuple("---" for _ in COLUMNS),
        *(_row(entry, cases.get(entry.family, [])) for entry in ARCHITECTURES),
        *((each.family, _names(each.classes), "**refused**", "-", "-", "no", each.reason) for each in REFUSED),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _names(classes: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in classes)


def _row(entry: Architecture, cases: list[str]) -> tuple[str, ...]:
    classes = _names(entry.classes)
    rope_types = ", ".join(name for name in entry.rope_types if name != "default") or "-"
    if entry.gguf is None:
        return entry.family, classes, "not in llama.cpp", "-", "-", _yes(entry.exl2 is not None), "native"
    windows = f"all but every {entry.period}th block" if entry.period and entry.period > 2 else "every other block"
    without = entry.period == 1 or (entry.encoder and entry.period is None)
    windows = "-" if without else windows if entry.period else "context cut to one"
    windows = "any blocks" if entry.any_windows else "all blocks" if entry.all_windows else windows
    tests = ENCODERS[entry.gguf] if entry.encoder else ", ".join(cases)
    return entry.family, classes, f"`{entry.gguf}`", rope_types, windows, _yes(entry.exl2 is not None), tests


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


if __name__ == "__main__":
    print(table(tested()), end="")
