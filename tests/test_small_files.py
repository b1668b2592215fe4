"""Damaged small files of a source are refused before any work, for every target."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lqexport.errors import UserError
from lqexport.pipeline.quantize import quantize
from lqexport.planning.dryrun import preview
from lqexport.planning.small_files import OBJECTS, check_small_files
from lqexport.recipe import Recipe
from lqexport.storage.files import write_json

ROWS = 512


@pytest.fixture
def model(smaller_model: Path, tmp_path: Path) -> Path:
    """A copy of a model, to be damaged."""
    shutil.copytree(smaller_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("run", [preview, lambda recipe, out: quantize(recipe, out, device="cpu")])
@pytest.mark.parametrize("target", ["gguf:Q8_0", "native:table-4", "gptq:4-g32", "exl2"])
def test_a_damaged_file_is_refused_for_every_target(
    target: str, run: Callable[[Recipe, Path], Any], model: Path, tmp_path: Path
) -> None:
    (model / "generation_config.json").write_text("{")
    recipe = Recipe(str(model), target, bits=4.5 if target == "exl2" else None, method="rtn")
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read as JSON"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
@pytest.mark.parametrize("name", OBJECTS)
def test_every_file_of_settings_must_hold_an_object(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} (cannot be read as JSON|is damaged)"):
        check_small_files(tmp_path, ROWS)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', not the id of a token"),
        ({"eos_token_id": [2, None, 1.5]}, "eos_token_id is 1.5, not"),
        ({"bos_token_id": True}, "bos_token_id is True, not"),
        ({"pad_token_id": {}}, "pad_token_id is {}, not"),
        ({"eos_token_id": [2, 512]}, "eos_token_id has 512, and the embedding has 512 rows"),
        ({"bos_token_id": -1}, "bos_token_id has -1, and"),
        ({"eos_token_id": [2, 511], "bos_token_id": None, "pad_token_id": -1}, None),
    ],
)
def test_ids_of_tokens(ids: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    write_json(tmp_path / "generation_config.json", ids)
    if said is None:
        check_small_files(tmp_path, ROWS)
        return
    with pytest.raises(UserError) as caught:
        check_small_files(tmp_path, ROWS)
    assert said in str(caught.value)


BROKEN = "{% for message in messages %}{{ message.content }}"


def test_a_chat_template_must_parse_wherever_it_stands(tmp_path: Path) -> None:
    said = r"^The chat template '(default|rag)' of .* does not parse: line 1: Unexpected end of template"
    (tmp_path / "chat_template.jinja").write_text(BROKEN)
    with pytest.raises(UserError, match=said):
        check_small_files(tmp_path, ROWS)
    (tmp_path / "chat_template.jinja").write_text("{% generation %}{{ messages }}{% endgeneration %}")
    check_small_files(tmp_path, ROWS)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(BROKEN)
    with pytest.raises(UserError, match=said):
        check_small_files(tmp_path, ROWS)


@pytest.mark.parametrize("template", [BROKEN, [{"name": "default", "template": BROKEN}], [{"name": "default"}]])
def test_a_chat_template_in_the_settings_must_parse(template: object, tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    with pytest.raises(UserError, match=r"does not parse|needs a name and a template"):
        check_small_files(tmp_path, ROWS)


def test_a_chat_template_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"A chat template of .* is damaged"):
        check_small_files(tmp_path, ROWS)
