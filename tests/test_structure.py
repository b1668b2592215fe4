"""How the packages hang together: one-way imports without a circle, short functions, every package listed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import pytest

import lqexport

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
TOP_FOLDERS = sorted(folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file())
MAPPED = ("formats", "converters", "kernels")
"""Folders that install within lqexport."""

LAYERS = (
    ("errors",),
    ("target", "arguments"),
    ("sizes", "recipe"),
    ("formats",),
    ("kernels", "storage"),
    ("converters", "runtime", "grids"),
    ("models", "solver", "integration"),
    ("calibration", "pictures"),
    ("tuning", "evaluation"),
    ("checking", "exporting"),
    ("planning", "verification"),
    ("pipeline",),
    ("delivery",),
    ("cli",),
    ("__main__",),
)
"""Parts of lqexport: each may import those of the layers above it in this list, and itself."""

CONVERTER_LAYERS = (
    ("models", "plan", "checkpoints"),
    ("factors",),
    ("gguf", "counting"),
    ("model_tensors",),
    ("targets", "mmproj"),
    ("folders",),
    ("exl2", "exl3", "mlx"),
    ("folder_formats",),
)
"""The same within converters/."""


def module_name(path: Path) -> str:
    """The dotted name that a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lqexport" else ("lqexport", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in TOP_FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
SCRIPTS = [path for folder in ("tests", "bench", "tools", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(source: str) -> set[str]:
    """Modules that a source imports, at any depth; `from a import b` counts as a.b, `from . import b` as ..b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def within(module: str, packages: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def allowed(part: str, layers: tuple[tuple[str, ...], ...]) -> set[str]:
    """The parts that a part may import: itself and those of the layers before its own."""
    own_layer = next(number for number, layer in enumerate(layers) if part in layer)
    return {part} | {name for layer in layers[:own_layer] for name in layer}


def forbidden(source: str, part: str, layers: tuple[tuple[str, ...], ...], prefix: str = "lqexport") -> set[str]:
    """Imports of ours that a module of a part may not have; relative ones are never allowed."""
    permitted = [f"{prefix}.{name}" for name in allowed(part, layers)]
    ours = {name for name in imports(source) if within(name, (prefix,)) or name.startswith(".")}
    return {name for name in ours if not within(name, permitted)}


@cache
def imported_modules(module: str) -> frozenset[str]:
    """Our modules that a module imports, by the names of their files."""
    names = imports(MODULES[module].read_text(encoding="utf-8"))
    candidates = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return frozenset(candidates & MODULES.keys() - {"lqexport"})


PARTS = sorted({module.split(".")[1] for module in MODULES if module != "lqexport"})
CONVERTER_PARTS = sorted({module.split(".")[2] for module in MODULES if module.startswith("lqexport.converters.")})


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_one_way(part: str) -> None:
    for module, path in MODULES.items():
        if within(module, (f"lqexport.{part}",)):
            assert forbidden(path.read_text(encoding="utf-8"), part, LAYERS) == set(), path


@pytest.mark.parametrize("part", CONVERTER_PARTS)
def test_imports_of_converters_go_one_way(part: str) -> None:
    for module, path in MODULES.items():
        if within(module, (f"lqexport.converters.{part}",)):
            source = path.read_text(encoding="utf-8")
            assert forbidden(source, part, CONVERTER_LAYERS, "lqexport.converters") == set(), path


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter({module: imported_modules(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"A circle of imports: {' -> '.join(error.args[1])}")


def test_verification_reaches_nothing_of_the_solver() -> None:
    """A verifier that shared code with the solver would share its errors."""
    reached: set[str] = set()
    waiting = [module for module in MODULES if module.startswith("lqexport.verification.")]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imported_modules(module)
    not_allowed = ("lqexport.solver", "lqexport.tuning", "lqexport.planning", "lqexport.pipeline")
    assert [module for module in sorted(reached) if within(module, not_allowed)] == []


def test_no_package_bears_the_name_of_a_public_function() -> None:
    """Once it is imported, a package or module of that name would stand in the function's place."""
    for name in lqexport.__all__:
        assert f"lqexport.{name}" not in MODULES


def test_functions_stay_short(load_script: Callable[[str], ModuleType]) -> None:
    """No package is longer by median, 90th percentile or longest function than the house was when it was rebuilt."""
    script = load_script("tools/function_lengths.py")
    counts = [count for folder in script.TOP_FOLDERS for count in script.lengths(ROOT / folder)]
    median, ninety, longest = script.summary(counts)
    assert median <= 5
    assert ninety <= 14
    assert longest <= 55


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*MODULES.values(), *SCRIPTS], ids=relative)
def test_nobody_imports_a_folder_by_its_bare_name(path: Path) -> None:
    assert {name for name in imports(path.read_text(encoding="utf-8")) if within(name, MAPPED)} == set()


def test_these_checks_see_every_kind_of_import() -> None:
    source = (
        "import lqexport.solver.feedback\ndef f():\n    from lqexport import storage\n    from . import codec\n"
        "import lqexports"
    )
    everything = {"lqexport.solver.feedback", "lqexport.storage", "..codec"}
    assert forbidden(source, "formats", LAYERS) == everything
    assert forbidden(source, "converters", LAYERS) == everything - {"lqexport.storage"}
    assert forbidden(source, "cli", LAYERS) == {"..codec"}
    assert within("formats.gguf", MAPPED)
    assert within("kernels", MAPPED)
    assert not within("kernels_of_others", MAPPED)


def test_packages_are_the_folders() -> None:
    """An unlisted package works in an editable install and is missing from the wheel."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = setuptools["package-dir"]
    assert set(folders.values()) == set(TOP_FOLDERS)
    assert sorted(setuptools["packages"]) == sorted(
        module for module, path in MODULES.items() if path.name == "__init__.py"
    )


def test_the_bench_of_stages_times_functions_that_exist(load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("bench/processor_seconds.py")
    for path in (path for functions in script.STAGES.values() for path in functions):
        module, _, name = path.partition(":")
        attrgetter(name)(import_module(f"lqexport.{module}"))
