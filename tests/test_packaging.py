"""The package's metadata: what is installed, pinned versions, type checks and CI."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAPPED = ("formats", "converters", "kernels")
"""Folders that install within lqexport."""
CODE = (".py", ".pyc", ".nbi", ".nbc")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def packages(root: Path) -> dict[str, Path]:
    """Folder of every package by its name; the links within lqexport/ are not followed."""
    inits = [path for top in ("lqexport", *MAPPED) for path in sorted((root / top).rglob("__init__.py"))]
    folders = {path.parent.relative_to(root).as_posix().replace("/", "."): path.parent for path in inits}
    return {name if name.split(".")[0] == "lqexport" else f"lqexport.{name}": path for name, path in folders.items()}


def test_sub_packages_have_a_docstring_and_import_nothing(root: Path) -> None:
    for name, folder in packages(root).items():
        module = ast.parse((folder / "__init__.py").read_text())
        assert ast.get_docstring(module), name
        assert name == "lqexport" or len(module.body) == 1, name


def test_every_data_file_installs(root: Path, project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    for package, folder in packages(root).items():
        others = {path for path in folder.iterdir() if path.is_file() and path.suffix not in CODE}
        listed = {path for pattern in patterns.get(package, []) for path in folder.glob(pattern)}
        assert others == listed, package


def test_type_checkers_see_the_package_as_it_installs(root: Path, project: dict[str, Any]) -> None:
    """Type checkers do not follow setuptools' package-dir: links within lqexport/ show them the mapped folders."""
    for name, folder in project["tool"]["setuptools"]["package-dir"].items():
        if name != "lqexport":
            link = root / name.replace(".", "/")
            assert link.is_symlink()
            assert link.resolve() == root / folder
    assert project["tool"]["mypy"]["files"] == ["lqexport"]


@pytest.mark.parametrize("name", MAPPED)
def test_folders_are_no_modules_of_their_own(name: str, root: Path) -> None:
    file = importlib.import_module(f"lqexport.{name}").__file__
    assert file is not None
    spec = importlib.util.find_spec(name)  # PyPI has packages of such names
    assert spec is None or not str(spec.origin).startswith(str(root))


def test_command_and_version(project: dict[str, Any]) -> None:
    assert importlib.metadata.version("lqexport") == project["project"]["version"]
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="lqexport")
    assert callable(entry.load())


def test_constraints_pin_one_version_each_and_torch_to_a_cpu_build_at_hand(root: Path, project: dict[str, Any]) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {requirement.name.lower(): requirement.specifier for requirement in map(Requirement, lines)}
    assert len(pins) == len(lines)
    assert all(len(pin) == 1 and next(iter(pin)).operator == "==" for pin in pins.values())
    needed = {Requirement(line).name.lower() for line in project["project"]["dependencies"]} - {"tomli"}
    assert needed <= pins.keys()


def test_every_option_of_pyproject_admits_what_is_pinned(root: Path, project: dict[str, Any]) -> None:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {pin.name.lower(): next(iter(pin.specifier)).version for pin in map(Requirement, lines)}
    optional = project["project"]["optional-dependencies"].values()
    for line in [*project["project"]["dependencies"], *(line for extra in optional for line in extra)]:
        requirement = Requirement(line)
        if requirement.name.lower() in pins:
            assert requirement.specifier.contains(pins[requirement.name.lower()]), line


def test_links_of_the_readme_work_on_pypi_too(root: Path, project: dict[str, Any]) -> None:
    """PyPI shows the README without the files beside it: every link is absolute, and what it names is there."""
    base = project["project"]["urls"]["Homepage"] + "/blob/main/"
    links = re.findall(r"\]\(([^)#][^)]*)\)", (root / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        assert link.startswith(base), link
        assert (root / link.removeprefix(base).partition("#")[0]).is_file(), link


def test_the_newest_entry_of_the_changelog_is_this_version(root: Path, project: dict[str, Any]) -> None:
    newest = re.search(r"^## (\d\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["project"]["version"]


def test_ci_runs_the_test_command_of_the_readme(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
    assert "make test" in (root / "README.md").read_text()
