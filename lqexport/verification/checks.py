"""`check`: looks at GGUF files by themselves, and at each against its source if there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lqexport.checking.checking import FileCheck, check_file
from lqexport.checking.problems import error, warning
from lqexport.converters.gguf.split import is_gguf, is_later_part
from lqexport.errors import UserError, files_at_hand
from lqexport.evaluation.figures import finite_or_null
from lqexport.models.model_path import check_exists
from lqexport.runtime.progress import Listener, Silent
from lqexport.sizes import human_bytes
from lqexport.verification.default_limits import MAX_PERPLEXITY_RATIO

if TYPE_CHECKING:
    from lqexport.verification.result import Engine


@dataclass(frozen=True)
class CheckResult:
    """The results of checking several files, one entry for each."""

    files: list[FileCheck]

    @property
    def failed(self) -> bool:
        """Whether any file has an error."""
        return any(entry.errors for entry in self.files)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values, for `--json`."""
        return {"passed": not self.failed, "files": [_entry(entry) for entry in self.files]}


def _entry(entry: FileCheck) -> dict[str, Any]:
    content = dataclasses.asdict(entry) | {"passed": not entry.errors}
    if entry.sizes:
        content["sizes"]["bits_per_weight"] = entry.sizes.bits_per_weight
    content["problems"] = [
        {"level": problem.level, "area": problem.area, "sentence": problem.sentence} for problem in entry.problems
    ]
    result: dict[str, Any] = finite_or_null(content)
    return result


@files_at_hand()
def check(
    files: Sequence[str | Path] | str | Path, against: str | None = None, *, listener: Listener | None = None
) -> CheckResult:
    """Checks .gguf files by themselves, whoever wrote them, and each against its source if `against` is given.

    files     files, or folders whose .gguf files are checked; of a split model the first file stands for all
    against   the source: a folder, a hub id or a .gguf file. Everything that `verify` does by default is
              done, in llama.cpp where it is installed.

    Raises UserError if there is no such file, or no .gguf file in a folder. What is wrong with a file is in the result.
    """
    listener = listener or Silent()
    names = [files] if isinstance(files, str | Path) else files
    if not names:
        raise UserError("Give at least one file to check.")
    paths = [path for name in names for path in _paths(Path(name))]
    results = []
    for path in paths:
        result = check_file(path, listener=listener)
        if against is not None and result.sizes is not None and not result.errors:
            _compare(result, path, against, listener)
        results.append(result)
    return CheckResult(results)


def _paths(path: Path) -> list[Path]:
    """Returns the file, or the .gguf files of a folder that are no later part of a split model."""
    if path.is_dir():
        files = sorted(entry for entry in path.glob("[!.]*") if is_gguf(entry) and entry.is_file())
        if not files:
            raise UserError(f"There is no .gguf file in {path}.")
        return [entry for entry in files if not is_later_part(entry, files)]
    check_exists(path)
    return [path]


def _compare(result: FileCheck, path: Path, against: str, listener: Listener) -> None:
    """Verifies a file against its source, and adds what is wrong to its problems."""
    from lqexport.verification.verifying import verify  # imports torch and transformers, which takes seconds

    engine: Engine = "llama.cpp" if result.engine == "loads" else "lqexport"
    verification = verify(path, against, engine=engine, max_perplexity_ratio=MAX_PERPLEXITY_RATIO, listener=listener)
    result.problems += [error("source", sentence) for sentence in verification.failed]
    result.problems += [warning("source", sentence) for sentence in (*verification.warnings, *verification.causes)]


def table(result: CheckResult) -> RenderableType:
    """Returns what `lqexport check` prints: a row for each file, then the problems."""
    rows = Table(box=None, pad_edge=False)
    rows.add_column("file", overflow="fold")
    for title in ("architecture", "type", "llama.cpp", "result"):
        rows.add_column(title)
    for title in ("tensors", "weights", "bits", "size"):
        rows.add_column(title, justify="right")
    lines = []
    for entry in result.files:
        rows.add_row(*map(Text, _row(entry)))
        for problem in entry.problems:
            style = "red" if problem.level == "error" else "yellow"
            lines.append(Text(f"{Path(entry.file).name}: {problem.level}: {problem.sentence}", style=style))
    return Group(rows, Text(), *lines) if lines else rows


def _row(entry: FileCheck) -> list[str]:
    sizes = entry.sizes
    numbers = ["", "", "", ""]
    if sizes:
        numbers = [str(sizes.tensors), f"{sizes.weights / 1e6:.1f} M", f"{sizes.bits_per_weight:.3f}"]
        numbers.append(human_bytes(sizes.nbytes))
    counts = [_counted(len(entry.errors), "error"), _counted(len(entry.warnings), "warning")]
    verdict = ", ".join(filter(None, counts)) or "sound"
    return [entry.file, entry.architecture, sizes.type if sizes else "", entry.engine, verdict, *numbers]


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count > 1)}" if count else ""
