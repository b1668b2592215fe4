"""Every block of code in the README and the pages runs, on a tiny model, or says before it why it does not.

A comment before a block, `<!-- not run: it takes hours -->`, says why none of it runs. One such as
`<!-- not run (eval, judge): they need the network -->` is about some of its commands. What does not run is checked all
the same: that files, make targets and options exist (`lqexport` commands: tests/test_docs.py). Blocks of other text,
such as printed tables, are not code.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lqexport.calibration import texts
from lqexport.cli import options as cli_options
from lqexport.cli.app import app
from lqexport.delivery import deliver
from lqexport.planning import rates
from lqexport.recipe import Recipe
from lqexport.verification import report

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = re.compile(r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*(lqexport|python|\S+/python|pip|make|torchrun|bench/\S+\.sh) ")
"""Matches a line that is a command."""
MARKER = re.compile(r"<!-- not run(?: \(([\w, -]+)\))?: (.+) -->")
SENTENCE = "The quick brown fox {} jumps over the lazy dog and {} sleeps in the sun until the evening comes. "


@dataclass(frozen=True)
class Block:
    """An indented block of a page.

    line     number of its first line
    reason   why it does not run; None if it does
    apart    names of the commands that the reason is about; none for all
    """

    page: Path
    line: int
    lines: tuple[str, ...]
    reason: str | None
    apart: tuple[str, ...]

    @property
    def is_shell(self) -> bool:
        return all(SHELL.match(line) for line in self.commands)

    @property
    def is_python(self) -> bool:
        return not self.is_shell and re.search(r"\blqexport\.\w+\(|^import lqexport", "\n".join(self.lines)) is not None

    @property
    def commands(self) -> list[str]:
        """The lines, where a line that ends with a backslash goes on in the next."""
        return [line for line in "\n".join(self.lines).replace("\\\n", " ").splitlines() if line]

    def runs(self, command: str) -> bool:
        """Whether a command of the block is run."""
        name = shlex.split(command, comments=True)[1]
        return self.reason is None or (bool(self.apart) and (name not in self.apart or "--dry-run" in command))


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in its order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    blocks, number = [], 0
    while number < len(lines):
        if not lines[number].startswith("    ") or (number and lines[number - 1]):
            number += 1
            continue
        end = number
        while end < len(lines) and (lines[end].startswith("    ") or not lines[end]):
            end += 1
        above = next((line for line in reversed(lines[:number]) if line), "")
        marker = MARKER.fullmatch(above)
        apart = tuple(name.strip() for name in (marker[1] or "").split(",") if name) if marker else ()
        block = tuple(line[4:] for line in lines[number:end])
        blocks.append(Block(page, number + 1, block, marker[2] if marker else None, apart))
        number = end
    return blocks


BLOCKS = {page: blocks_of(page) for page in PAGES}
CODE = [block for blocks in BLOCKS.values() for block in blocks if block.is_shell or block.is_python]


def where(value: Any) -> str:
    return f"{value.page.name}:{value.line}" if isinstance(value, Block) else value.name


class SmallRecipe(Recipe):
    """A recipe of little work, whatever it is asked for."""

    def __init__(self, source: str, target: str = "", **options: Any) -> None:
        small = {"samples": 2, "sequence_length": 32, "method": "gptq" if options.get("size") else "rtn"}
        if options.get("tune"):
            small["tune"] = 1
        super().__init__(source, target, **options | {"tune": 0} | small)


@pytest.fixture(scope="module")
def little_work() -> Any:
    """Short texts, small recipes, no plots and no measured rates, in the place of the defaults."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    content = {
        name: "".join(SENTENCE.format(f"{name} {first}", second) for first in words for second in words)[:2600]
        for name in (*texts.BUILT_IN, "hub")
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in texts.BUILT_IN:
            patch.setitem(texts.BUILT_IN, name, lambda name=name: (content[name],))
        patch.setattr(texts, "_read_hub", lambda *_: [content["hub"]])
        for module in (cli_options, deliver):
            patch.setattr(module, "Recipe", SmallRecipe)
        patch.setattr(report, "plots", lambda _: [])
        patch.setattr(rates, "measured_rate", lambda *_: 1e11)
        yield


@pytest.fixture(scope="module")
def samples(little_work: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages take as given: models, files, folders."""
    folder = tmp_path_factory.mktemp("samples")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copy(tiny_model / "config.json", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for target, step, name in (
            ("native:table-3", "to-native", "model-3bit"), ("gptq:4-g128", "to-gptq", "model-GPTQ"),
            ("gguf:Q4_0", "to-gguf", "model.gguf"),
        ):  # fmt: skip
            shutil.rmtree("out", ignore_errors=True)
            run(["quantize", "./model", "./out", "--target", target])
            run([step, "./out", name])
    (folder / "downloads").mkdir()
    for copy in ("a.gguf", "b.gguf", "downloads/c.gguf"):
        shutil.copy(folder / "model.gguf", folder / copy)
    return folder


def run(arguments: list[str]) -> None:
    """Runs a command of lqexport in this process."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"lqexport {shlex.join(arguments)}\n{result.output}{result.stderr}"


def run_line(line: str) -> None:
    """Runs a command of a page. Its output is removed before, since a page has several ways to write the same.

    A comment `# of --bits 3.5` says how the artifact is quantized that the command takes.
    """
    name, *arguments = shlex.split(line, comments=True)[1:]
    if made := re.search(r"# of (--.*)", line):
        recipe = shlex.split(made[1])
        target = [] if "--target" in recipe else ["--target", "gguf:Q4_K_M"]
        remove("./out")
        run(["quantize", "./model", "./out", *target, *recipe])
    if name in ("quantize", "export") or name.startswith("to-"):
        remove(arguments[1])
    run([name, *arguments])


def remove(output: str) -> None:
    """Removes a file or folder, and the record of its export."""
    for path in (Path(output), Path(f"{output}.record")):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


@pytest.mark.llamacpp
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.page == page for block in CODE)], ids=where)
def test_what_a_page_shows_runs(page: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a page run one after the other in one folder, as a reader would run them."""
    folder = tmp_path / "page"
    shutil.copytree(samples, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in (block for block in CODE if block.page == page):
        if block.is_python and block.reason is None:
            for output in ("./out", "model-Q4_K_M.gguf"):
                remove(output)
            patched = "\n".join(block.lines).replace("lqexport.Recipe(", "SmallRecipe(")
            exec(compile(patched, where(block), "exec"), names | {"SmallRecipe": SmallRecipe}, names)
        for line in block.commands if block.is_shell else []:
            if line.startswith("lqexport ") and block.runs(line):
                run_line(line)


@pytest.mark.parametrize("block", [block for block in CODE if block.is_shell], ids=where)
def test_what_does_not_run_exists(block: Block) -> None:
    """Commands other than lqexport's are not run: each block of them says why, and names what there is."""
    for line in block.commands:
        words = shlex.split(line, comments=True)
        while "=" in words[0]:
            words.pop(0)
        if words[0] != "lqexport":
            assert block.reason, f"{where(block)} has no comment `<!-- not run: ... -->`"
            CHECKS[Path(words[0]).name.partition(".")[0]](words)


def check_script(words: list[str]) -> None:
    """The script exists, and its text or that of the modules beside it has every option."""
    if words[1] == "-m":
        assert words[2] in ("pytest", "lqexport")
        return
    script = ROOT / words[1]
    source = "".join(path.read_text(encoding="utf-8") for path in (script, ROOT / "bench" / "common.py"))
    own = words[2 : words.index("--")] if "--" in words else words[2:]
    for option in (word for word in own if word.startswith("--")):
        assert re.search(rf'["(](--)?{option[2:]}[")]', source), f"{words[1]} has no {option}"


def check_make(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words


def check_pip(words: list[str]) -> None:
    extras = [extra for word in words for extra in re.findall(r"\.\[([\w,]+)\]", word)]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in ",".join(extras).split(","):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def check_file(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), words[0]


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_script, "make": check_make, "pip": check_pip, "torchrun": lambda words: None,
    "gpu_scale": check_file,
}  # fmt: skip
"""The last part of a command's name -> its check."""


def test_markers_stand_before_blocks() -> None:
    """A marker that stands anywhere else, or is misspelled, would have no effect."""
    for page, blocks in BLOCKS.items():
        shown = page.read_text(encoding="utf-8").count("<!-- not run")
        assert shown == sum(block.reason is not None for block in blocks), page.name
