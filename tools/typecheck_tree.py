"""Links the packages into .typecheck/lqexport as they are installed.

Type checkers do not follow the package-dir mappings of pyproject.toml, so they check this folder.

python tools/typecheck_tree.py && mypy
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUBPACKAGES = ("formats", "converters", "kernels")


def link(tree: Path) -> None:
    """Makes `tree` the package's folder: links to every entry of lqexport/ and to the folders installed within it."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for path in (ROOT / "lqexport").iterdir():
        if path.name != "__pycache__":
            (tree / path.name).symlink_to(path)
    for name in SUBPACKAGES:
        (tree / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    link(ROOT / ".typecheck" / "lqexport")
