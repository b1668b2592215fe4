"""Link the packages into .typecheck/lqexport as they install, since type checkers do not follow package-dir mappings.

python tools/typecheck_tree.py && mypy
"""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUBPACKAGES = ("formats", "converters", "kernels")


def link(tree: Path) -> None:
    """Make `tree` a package folder: a link to every file of lqexport/, and one to each folder that installs in it."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for path in (ROOT / "lqexport").iterdir():
        if path.name != "__pycache__":
            (tree / path.name).symlink_to(path)
    for name in SUBPACKAGES:
        (tree / name).symlink_to(ROOT / name)


if __name__ == "__main__":
    link(ROOT / ".typecheck" / "lqexport")
