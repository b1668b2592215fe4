"""A mkdocs hook that generates the pages of the site that are no files of docs/ (mkdocs.yml, `make docs`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import lqexport

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/lqexport/lqexport/blob/main/"
"""Where links of the README lead, so that they work on PyPI, too."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to `files`, which are those of docs/. mkdocs calls this."""
    for name, content in {"index.md": first_page(), "reference.md": reference(), "commands.md": commands()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def first_page() -> str:
    """Returns README.md, with its links made relative to docs/."""
    return (ROOT / "README.md").read_text().replace(f"]({REPOSITORY}docs/", "](")


def reference() -> str:
    """Returns the page with a section (signature and docstring) for each public name."""
    block = "::: lqexport.{module}.{name}\n    options:\n      heading: lqexport.{name}"
    modules = sorted(lqexport._MODULES.items(), key=lambda entry: entry[0].lower())
    sections = [block.format(name=name, module=module) for name, module in modules]
    return "\n\n".join(["# Python reference", "[From Python](python.md) shows how they are used.", *sections])


def commands() -> str:
    """Returns the help of every command, as Typer writes it in Markdown."""
    # `python -m typer` runs the module without importing it, and dataclasses fail in a module that is not imported.
    run = "import lqexport.cli.app, runpy; runpy.run_module('typer', run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        run,
        "lqexport.cli.app",
        "utils",
        "docs",
        "--name",
        "lqexport",
        "--title",
        "Commands",
    ]
    # In the root, Python would import lqexport/ from there, without the folders that are installed within it.
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "docs").stdout
