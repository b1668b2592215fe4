"""The documentation: the site is built without a warning and holds every page, public name and command."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import lqexport
from lqexport.cli.app import app

missing = [name for name in ("material", "mkdocs", "mkdocstrings") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with `--strict`: a warning is an error. Skips where the extra `docs` is missing."""
    if missing:
        pytest.skip(f"the extra `docs` is missing: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", root / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(
        [*command, "--site-dir", folder], check=False, capture_output=True, text=True, cwd=root, env=environment
    )
    assert made.returncode == 0, made.stderr
    return folder


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "lqexport" / "cli").glob("*.py"))]
SHOWN = [
    (page.name, line)
    for page in PAGES
    for line in re.findall(r"^ {4,8}(lqexport \w.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


@pytest.mark.parametrize(("where", "line"), SHOWN)
def test_every_command_that_is_shown_parses(where: str, line: str) -> None:
    """Names, options, types and the number of arguments; nothing is run."""
    name, *arguments = shlex.split(line, comments=True)[1:]
    get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]  # it is a group


def test_every_page_has_a_line_in_the_contents(root: Path) -> None:
    """Here too, since the build, which says so, is skipped where mkdocs is missing."""
    listed = set(re.findall(r"^ +- ([\w-]+\.md)$", (root / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed - {"index.md", "commands.md", "reference.md"} == {path.name for path in (root / "docs").glob("*.md")}


def test_every_page_is_there(site: Path, root: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert pages == {path.stem for path in (root / "docs").glob("*.md")} | {"404", "index", "commands", "reference"}


@pytest.mark.parametrize("word", ["install", "ollama"])
def test_the_search_finds(word: str, site: Path) -> None:
    """The index of the search, which the page loads from a server, has the word in the text of the first page."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = [entry["location"] for entry in index["docs"] if word in f"{entry['title']} {entry['text']}".lower()]
    assert any(location.startswith("index.html") for location in found)


def test_nothing_comes_from_the_network(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"(https?:[^\"]*)", page.read_text())
        assert loaded == []


def test_the_reference_has_every_public_name_and_its_lists(site: Path) -> None:
    content = (site / "reference.html").read_text()
    headings = set(re.findall(r'<h2 id="lqexport\.[\w.]+\.(\w+)"', content))
    assert headings == set(lqexport.__all__) - {"__version__"}
    assert "<li><code>protocols</code>: names in" in content


def test_every_command_and_option_is_there(site: Path) -> None:
    content = (site / "commands.html").read_text()
    names = {str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback}
    assert {f"lqexport-{name.replace('_', '-')}" for name in names} <= set(re.findall(r'id="([\w-]+)"', content))
    assert "--max-perplexity-ratio" in content
