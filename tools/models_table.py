"""Prints the table of docs/models.md, from the table of architectures and the test cases of each family.

python tools/models_table.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import ARCHITECTURES
from lqexport.converters.models.refused import REFUSED

ROOT = Path(__file__).resolve().parent.parent
ENCODERS = {"bert": "test_encoders.py", "gemma-embedding": "test_embedding_gemma.py"}
"""GGUF architecture of an encoder -> the file with its tests."""
COLUMNS = ("family", "`architectures`", "GGUF as", "rope scaling in GGUF", "windows in GGUF", "EXL2", "tests")


def tested() -> dict[str, list[str]]:
    """Returns family -> the names of its cases in tests/helpers/family_cases.py."""
    spec = importlib.util.spec_from_file_location("family_cases", ROOT / "tests" / "helpers" / "family_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    cases: dict[str, list[str]] = {}
    for name in module.CASES:
        cases.setdefault(module.architecture_of_case(name).family, []).append(name)
    return cases


def table(cases: dict[str, list[str]]) -> str:
    """Returns the table in Markdown. `cases` is what `tested` returns."""
    rows = [
        COLUMNS,
        tuple("---" for _ in COLUMNS),
        *(_row(entry, cases.get(entry.family, [])) for entry in ARCHITECTURES),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def refused_table() -> str:
    """Returns the table of the architectures that are refused, in Markdown."""
    rows = [("family", "`architectures`", "refused, because"), ("---",) * 3]
    rows += [(each.family, ", ".join(f"`{name}`" for name in each.classes), each.reason) for each in REFUSED]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(entry: Architecture, cases: list[str]) -> tuple[str, ...]:
    classes = ", ".join(f"`{name}`" for name in entry.classes)
    rope_types = ", ".join(name for name in entry.rope_types if name != "default") or "-"
    if entry.gguf is None:
        return entry.family, classes, "not in llama.cpp", "-", "-", _yes(entry.exl2 is not None), "native"
    windows = f"all but every {entry.period}th block" if entry.period and entry.period > 2 else "every other block"
    without = entry.period == 1 or (entry.encoder and entry.period is None)
    windows = "-" if without else windows if entry.period else "context cut to one"
    windows = "any blocks" if entry.any_windows else windows
    tests = ENCODERS[entry.gguf] if entry.encoder else ", ".join(cases)
    return entry.family, classes, f"`{entry.gguf}`", rope_types, windows, _yes(entry.exl2 is not None), tests


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


if __name__ == "__main__":
    print(table(tested()), refused_table(), sep="\n", end="")
