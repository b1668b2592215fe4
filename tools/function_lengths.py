"""Prints how long the functions of each package are: median, 90th percentile and longest, in lines without docstrings.

python tools/function_lengths.py [CHECKOUT]
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOP_FOLDERS = ("formats", "kernels", "converters", "lqexport")


def lengths(folder: Path) -> list[int]:
    """Returns the lines of every function in the Python files of a folder and below, docstrings left out."""
    return [length for path in sorted(folder.rglob("*.py")) for length in _lengths_in(path.read_text(encoding="utf-8"))]


def _lengths_in(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            yield lines


def summary(counts: list[int]) -> tuple[float, int, int]:
    """Returns the median, the 90th percentile and the largest of some counts."""
    return statistics.median(counts), sorted(counts)[int(0.9 * len(counts))], max(counts)


def table(root: Path) -> dict[str, tuple[int, float, int, int]]:
    """Returns by package: the number of functions, and the summary of their lengths; last, of all together."""
    folders = [folder for top in TOP_FOLDERS for folder in (root / top, *sorted((root / top).iterdir()))]
    # The links within lqexport/ lead to folders that are in the list themselves.
    packages = [folder for folder in folders if (folder / "__init__.py").is_file() and not folder.is_symlink()]
    rows = {str(folder.relative_to(root)): lengths(folder) for folder in packages}
    rows["all"] = [length for top in TOP_FOLDERS for length in lengths(root / top)]
    return {name: (len(counts), *summary(counts)) for name, counts in rows.items() if counts}


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    print(f"{'package':28}{'functions':>10}{'median':>8}{'90 %':>6}{'longest':>9}")
    for name, (count, median, ninety, longest) in table(root).items():
        print(f"{name:28}{count:>10}{median:>8g}{ninety:>6}{longest:>9}")


if __name__ == "__main__":
    main()
