"""The notebook in examples/ runs, without the cells that need the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.llamacpp
def test_the_notebook_runs(root: Path, smaller_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((root / "examples" / "export.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    for path in smaller_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"source": ".", "options": {"samples": 2, "sequence_length": 32, "tune": 0}, "windows": 1}
    for cell in cells:
        if "network" not in cell["metadata"].get("tags", ()):
            exec("".join(cell["source"]), names)  # our own notebook
    assert names["done"].passed
    assert (tmp_path / "model-Q4_0.gguf").is_file()


def test_the_image_and_the_notebook_install_as_the_readme_says(root: Path) -> None:
    extras, constraints = "[llamacpp,report]'", "-c constraints.txt"
    for name in ("README.md", "Dockerfile"):
        text = (root / name).read_text(encoding="utf-8")
        assert constraints in text
        assert extras in text
    notebook = (root / "examples" / "export.ipynb").read_text(encoding="utf-8")
    assert "-c lqexport/constraints.txt './lqexport[llamacpp,report]'" in notebook
