"""Checkpoints that call their tensors otherwise than transformers' modules, or pickle them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lqexport.errors import UserError
from lqexport.models.source import open_source


def of_language_model(name: str) -> str:
    return f"language_model.{name}"


def of_inner_language_model(name: str) -> str:
    return "lm_head.weight" if name.startswith("lm_head") else f"model.language_model.{name.removeprefix('model.')}"


def of_bare_language_model(name: str) -> str:
    return f"language_model.{name.removeprefix('model.')}"


def without_base(name: str) -> str:
    return name.removeprefix("model.")


@pytest.mark.parametrize("rename", [of_language_model, of_inner_language_model, of_bare_language_model, without_base])
def test_other_prefixes(smaller_model: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(smaller_model / "model.safetensors")
    (tmp_path / "config.json").write_bytes((smaller_model / "config.json").read_bytes())
    stored = {rename(name): tensor for name, tensor in tensors.items()}
    if rename is not without_base:
        stored["vision_tower.patch.weight"] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    assert set(source.names()) == tensors.keys()
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_the_command_for_pickled_weights_converts_them(smaller_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    for path in smaller_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(smaller_model / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights") as refused:
        open_source(str(folder))
    found = re.search(r"python -c .*", str(refused.value))
    assert found is not None
    _, _, code = shlex.split(found[0])
    exec(code, {})
    source, expected = open_source(str(tmp_path / "a model-safetensors")), open_source(str(smaller_model))
    assert all(torch.equal(source.read(name).float(), expected.read(name).float()) for name in expected.names())
    assert json.loads(source.tokenizer().backend_tokenizer.to_str())["model"]["type"] == "BPE"
