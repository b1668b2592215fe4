"""Errors name a wrong thing that is given as a model, and what a broken download left in the place of a file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lqexport.calibration.texts import check_text, read_text
from lqexport.converters.gguf.header import read_header
from lqexport.converters.model_tensors import model_tensors
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.evaluation.papers import perplexity
from lqexport.evaluation.zero_shot_tasks import zero_shot
from lqexport.models.inspect import inspect
from lqexport.models.model_path import check_exists, check_source_name
from lqexport.models.source import open_source
from lqexport.models.tokenizer_files import load_tokenizer
from lqexport.storage.artifact import Artifact

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = "\n<!DOCTYPE html><html><body>Not found</body></html>"


@pytest.fixture
def model(smaller_model: Path, tmp_path: Path) -> Path:
    """A copy of the smaller model, for changes."""
    return Path(shutil.copytree(smaller_model, tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(("content", "said"), [(POINTER, "is a pointer of Git LFS"), (PAGE, "is a web page")])
def test_what_stands_in_for_a_file_is_told(name: str, content: str, said: str, model: Path) -> None:
    (model / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} {said}, and not the file itself"):
        open_source(str(model))


def test_a_pointer_in_the_place_of_a_gguf_file_or_a_tokenizer_is_told(model: Path) -> None:
    for name in ("model.gguf", "tokenizer.json"):
        (model / name).write_text(POINTER)
    with pytest.raises(UserError, match=r"model.gguf is a pointer of Git LFS"):
        read_header(model / "model.gguf")
    with pytest.raises(UserError, match=r"tokenizer.json is a pointer of Git LFS"):
        load_tokenizer(model)


def test_a_folder_without_a_tokenizer_says_so(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: there is none of tokenizer.json, tokenizer.model"):
        load_tokenizer(model)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    for read in (read_text, check_text):
        with pytest.raises(UserError, match=r"is a folder\. Give one of its files"):
            read(str(tmp_path))


@pytest.mark.parametrize(
    "look",
    [
        inspect,
        perplexity,
        lambda path: zero_shot(path, ["arc_easy"]),
        check_exists,
        lambda path: check_source_name(str(path)),
    ],
)
def test_a_folder_that_must_not_be_looked_at_is_named(
    look: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for method in ("exists", "is_file", "is_dir"):
        monkeypatch.setattr(Path, method, denied)
    with pytest.raises(UserError, match=r"closed.*: Permission denied\."):
        look(tmp_path / "closed")


def test_a_model_is_no_artifact(model: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json. It holds a model: `lqexport export` makes files of it"):
        Artifact(model).manifest()


def test_a_file_of_a_model_is_no_model(model: Path) -> None:
    with pytest.raises(UserError, match=f"Give its folder, {model}"):
        check_source_name(str(model / "model.safetensors"))


@pytest.mark.parametrize("begin", ["https://huggingface.co/", "hf.co/"])
@pytest.mark.parametrize("end", ["", "/", "/tree/main"])
def test_the_address_of_a_model_has_its_id(begin: str, end: str) -> None:
    with pytest.raises(UserError, match=r"Give the id alone: some/model-1\.5B\."):
        check_source_name(f"{begin}some/model-1.5B{end}")


@pytest.mark.parametrize("within", ["checkpoint-100", "snapshots/abcdef"])
def test_a_folder_of_models_names_one(within: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "models" / within)
    with pytest.raises(UserError, match=f"models has no config.json: .* Give the folder of a model: .*{within}"):
        open_source(str(tmp_path / "models"))


def test_tensors_beyond_the_config_are_named(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    source = open_source(str(model))
    shapes = {name: source.shape(name) for name in source.names()}
    with pytest.raises(UserError, match=r"that LlamaForCausalLM with num_hidden_layers=1 lacks: model.layers.1"):
        model_tensors(architecture_of(source.config), source.config, shapes)


def test_an_unknown_architecture_is_told_with_those_like_it() -> None:
    with pytest.raises(UserError, match=r"^Unknown architecture LlamaForCausalML\. Known ones like it: LlamaForCausal"):
        architecture_of({"architectures": ["LlamaForCausalML"]})
    with pytest.raises(UserError, match=r"^Unknown architecture Nobody\. All \d\d+ known ones are in https"):
        architecture_of({"architectures": ["Nobody"]})
