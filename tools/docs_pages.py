"""mkdocs calls this: the pages of the site that lie in no file of docs/ (mkdocs.yml, `make docs`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import lqexport

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages; mkdocs calls this with those of docs/."""
    for name, content in {"index.md": first_page(), "reference.md": reference(), "commands.md": commands()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def first_page() -> str:
    """README.md, with links as they are from docs/."""
    return (ROOT / "README.md").read_text().replace("](docs/", "](")


def reference() -> str:
    """A section of docstring and signature for each public name."""
    block = "::: lqexport.{module}.{name}\n    options:\n      heading: lqexport.{name}"
    modules = sorted(lqexport._MODULES.items(), key=lambda entry: entry[0].lower())
    sections = [block.format(name=name, module=module) for name, module in modules]
    return "\n\n".join(["# Python reference", "[From Python](python.md) shows how they are used.", *sections])


def commands() -> str:
    """What `--help` says of every command, as Typer writes it in Markdown."""
    # `python -m typer` alone runs the module without importing it, which its dataclasses do not bear.
    run = "import lqexport.cli.app, runpy; runpy.run_module('typer', run_name='__main__')"
    made = [sys.executable, "-c", run, "lqexport.cli.app", "utils", "docs", "--name", "lqexport", "--title", "Commands"]
    # Not from the root, where lqexport/ would be found without the folders that are installed within it.
    return subprocess.run(made, check=True, capture_output=True, text=True, cwd=ROOT / "docs").stdout
