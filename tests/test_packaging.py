"""The package's metadata: what is installed, pinned versions, type checks and CI."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUBPACKAGES = ("formats", "converters", "kernels")


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_listed_packages_are_the_folders_with_code(root: Path, project: dict[str, Any]) -> None:
    """A folder that is not listed works in an editable install but is missing from the wheel."""
    folders = {
        path.parent.relative_to(root) for top in ("lqexport", *SUBPACKAGES) for path in (root / top).rglob("*.py")
    }
    names = {str(folder).replace("/", ".") for folder in folders}
    installed = {name if name.split(".")[0] == "lqexport" else f"lqexport.{name}" for name in names}
    assert set(project["tool"]["setuptools"]["packages"]) == installed
    mapped = project["tool"]["setuptools"]["package-dir"]
    assert {folder.replace("/", ".") for folder in mapped.values()} == names


def test_sub_packages_have_a_docstring_and_import_nothing(root: Path) -> None:
    for folder in SUBPACKAGES:
        module = ast.parse((root / folder / "__init__.py").read_text())
        assert ast.get_docstring(module)
        assert len(module.body) == 1


def test_every_data_file_installs(root: Path, project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    for folder, package in (("lqexport", "lqexport"), *((name, f"lqexport.{name}") for name in SUBPACKAGES)):
        others = {path for path in (root / folder).iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
        listed = {path for pattern in patterns.get(package, []) for path in (root / folder).glob(pattern)}
        assert others == listed


@pytest.mark.parametrize("name", SUBPACKAGES)
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


def test_type_check_tree_has_every_module(root: Path, tmp_path: Path, load_script: Callable[[str], ModuleType]) -> None:
    load_script("tools/typecheck_tree.py").link(tmp_path / "lqexport")
    linked = {path.relative_to(tmp_path / "lqexport") for path in (tmp_path / "lqexport").glob("*.py")}
    assert linked == {path.relative_to(root / "lqexport") for path in (root / "lqexport").glob("*.py")}
    for name in SUBPACKAGES:
        assert (tmp_path / "lqexport" / name).resolve() == root / name


def test_ci_runs_the_test_command_of_the_readme(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
    assert "make test" in (root / "README.md").read_text()
