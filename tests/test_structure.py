"""How the packages hang together: imports go one way, and pyproject.toml lists every package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file())
SUBPACKAGES = ("formats", "converters", "kernels")
ALLOWED = {
    "formats": ("lqexport.formats",),
    "kernels": ("lqexport.formats", "lqexport.kernels"),
    "converters": (
        "lqexport.formats", "lqexport.storage.artifact", "lqexport.storage.files", "lqexport.storage.tensor_files", "lqexport.errors",
        "lqexport.converters",
    ),
    "lqexport": ("lqexport",),
}  # fmt: skip
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
SCRIPTS = [path for folder in ("tests", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(source: str) -> set[str]:
    """Modules that a source imports, at any depth; `from a import b` counts as a.b, `from . import b` as ..b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def forbidden(source: str, package: str) -> set[str]:
    """Imports of ours that a module of `package` may not have; relative ones never."""
    ours = {name for name in imports(source) if within(name, ("lqexport",)) or name.startswith(".")}
    return {name for name in ours if not within(name, ALLOWED[package])}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    assert forbidden(path.read_text(), path.relative_to(ROOT).parts[0]) == set()


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=relative)
def test_nobody_imports_a_folder_by_its_bare_name(path: Path) -> None:
    assert {name for name in imports(path.read_text()) if within(name, SUBPACKAGES)} == set()


def test_these_checks_see_every_kind_of_import() -> None:
    source = (
        "import lqexport.solve\ndef f():\n    from lqexport import artifact\n    from . import codec\nimport lqexports"
    )
    assert forbidden(source, "formats") == {"lqexport.solver.feedback", "lqexport.storage.artifact", "..codec_name"}
    assert forbidden(source, "converters") == {"lqexport.solver.feedback", "..codec_name"}
    assert forbidden(source, "lqexport") == {"..codec_name"}
    assert within("formats.gguf", SUBPACKAGES)
    assert within("kernels", SUBPACKAGES)
    assert not within("kernels_of_others", SUBPACKAGES)


def test_packages_are_the_folders() -> None:
    """An unlisted package works in an editable install and is missing from the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = setuptools["package-dir"]
    assert set(folders.values()) == set(PACKAGES) == set(ALLOWED)
    names = {folder: package for package, folder in folders.items()}
    inits = [
        path.parent.relative_to(ROOT).parts for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")
    ]
    assert sorted(setuptools["packages"]) == sorted(".".join((names[top], *rest)) for top, *rest in inits)
