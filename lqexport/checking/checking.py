"""Checks one file by itself: every check that needs no source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lqexport.checking.blocks import check_values
from lqexport.checking.engine import Loaded, load
from lqexport.checking.layout import check_layout
from lqexport.checking.opened import OpenFile, open_file
from lqexport.checking.presence import check_presence
from lqexport.checking.problems import Problem, error
from lqexport.checking.settings import check_settings
from lqexport.checking.shapes import check_shapes
from lqexport.checking.sizes import Sizes, check_name, sizes_of
from lqexport.checking.templates import check_templates
from lqexport.checking.tensor_tables import check_tensors
from lqexport.checking.vocabulary import check_vocabulary
from lqexport.errors import UserError, well_formed
from lqexport.runtime.progress import Listener, Silent

OF_METADATA = (check_settings, check_tensors, check_presence, check_shapes, check_vocabulary, check_templates)
"""The checks of a model's metadata and of its tensors' names and shapes."""


@dataclass
class FileCheck:
    """The result of checking one file.

    architecture   `general.architecture`; empty where it is not known
    sizes          None where the header cannot be read
    engine         what llama.cpp did with the file
    problems       in the order of the checks
    """

    file: str
    architecture: str = ""
    sizes: Sizes | None = None
    engine: Loaded = "not tried"
    problems: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "warning"]


def check_file(path: Path, *, engine: bool = True, listener: Listener | None = None) -> FileCheck:
    """Returns what is wrong with a .gguf file, or with a split model by its first file.

    engine   whether to load the file in llama.cpp, where it is installed

    What cannot be read is an error of the file, too. The cost is linear in the number of tensors and in their bytes.
    """
    result = FileCheck(str(path))
    try:
        file = open_file(path)
        result.architecture, result.sizes = file.architecture, sizes_of(file)
        result.problems += [*check_layout(file), *check_name(file)]
        result.problems += check_values(file, listener or Silent())
        if file.is_model:
            result.problems += metadata_problems(file)
    except UserError as fault:
        result.problems.append(error("structure", str(fault)))
        return result
    if engine and file.is_model:
        result.engine, problems = load(file)
        result.problems = [*_with_doubts(result.problems, result.engine), *problems]
    return result


def metadata_problems(file: OpenFile) -> list[Problem]:
    """Returns the problems of a model's metadata, and of its tensors' names and shapes. Reads no tensor.

    Raises UserError if the metadata has values of another form than a check expects.
    """
    with well_formed(f"The metadata of {file.path}"):
        return [problem for check in OF_METADATA for problem in check(file)]


def _with_doubts(problems: Iterable[Problem], engine: Loaded) -> list[Problem]:
    """Returns the problems; errors by our tables are warnings where llama.cpp loads the file."""
    return [
        dataclasses.replace(problem, level="warning") if problem.unless_loaded and engine == "loads" else problem
        for problem in problems
    ]
