"""Cards, pages, records and the metadata of files name no path of the machine that wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lqexport.models.licenses import license_of
from lqexport.models.source import open_source
from lqexport.models.source_view import SourceView
from lqexport.storage.published import is_hub_id, public_name, public_run, public_sentence


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("org/model-1.5", "org/model-1.5"),
        ("/home/me/models/llama", "llama"),
        ("./model/", "model"),
        ("~/models/llama.gguf", "llama.gguf"),
        ("a/b/c", "c"),
        ("/home/me/.cache/huggingface/hub/models--org--model-1.5/snapshots/0123abc", "org/model-1.5"),
    ],
)
def test_public_names(source: str, name: str) -> None:
    assert public_name(source) == name


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("models/llama")
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert not is_hub_id("models/llama")
    assert public_name("models/llama") == "llama"
    monkeypatch.chdir(tmp_path / "models")
    assert public_name(".") == "models"
    assert public_name("llama/..") == "models"


def test_sentences_lose_their_paths() -> None:
    names = {"my models/a.gguf": "a.gguf", "/home/me/my text.txt": "my text.txt"}
    said = "my models/a.gguf: /tmp/x/b.so and '/home/me/my text.txt' differ; see https://a.org/b/c, 1/2 and/or ~/x/y."
    assert public_sentence(said, names) == "a.gguf: b.so and 'my text.txt' differ; see https://a.org/b/c, 1/2 and/or y."


def test_a_run_without_paths() -> None:
    run = {"recipe": {"source": "/a/model", "calibration": "/a/text.txt", "target": "gguf:Q4_0"}, "calibration": None}
    assert public_run(run)["recipe"] == {"source": "model", "calibration": "text.txt", "target": "gguf:Q4_0"}
    assert public_run({"calibration": {"name": "texts/a.txt"}}) == {"calibration": {"name": "a.txt"}}
    assert run["recipe"]["source"] == "/a/model"  # type: ignore[index]


def test_the_license_of_a_source(tiny_model: Path, tmp_path: Path) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert license_of(open_source(str(tmp_path))) == {}
    (tmp_path / "README.md").write_text(
        "---\nlanguage:\n- en\nlicense: other\nlicense_name: 'of ours'\nlicense_link: https://a.org/b\n---\n"
        "license: mit\n"
    )
    stated = {"license": "other", "license_name": "of ours", "license_link": "https://a.org/b"}
    assert license_of(open_source(str(tmp_path))) == stated
    assert license_of(SourceView(open_source(str(tmp_path)))) == stated
    (tmp_path / "README.md").write_text("# license: mit\n")
    assert license_of(open_source(str(tmp_path))) == {}
