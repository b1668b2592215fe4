"""Calibration texts by name and from files, and the windows that are drawn from them."""

from __future__ import annotations

import builtins
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from lqexport.calibration import texts
from lqexport.calibration.sequences import load_calibration, overlap
from lqexport.calibration.texts import (
    BUILT_IN,
    CALIBRATION_MODULES,
    HELDOUT_MODULES,
    HUB_TEXTS,
    Text,
    _hub_documents,
    check_text,
    read_text,
)
from lqexport.errors import UserError
from lqexport.models import chat_template


class Characters:
    """A tokenizer with one token per character. With `bos`, every text begins with token 1, as in Llama's tokenizer."""

    bos_token_id = 1

    chat_template: str | None = None

    def __init__(self, bos: bool = False) -> None:
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [ord(character) for character in text]
        result = type("Encoding", (), {})()
        result.input_ids = [1, *ids] if self.bos and add_special_tokens else ids
        return result


@pytest.fixture
def ascending(tmp_path: Path) -> Path:
    """A text of 100 different characters in ascending order."""
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(200, 300))), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_texts_are_long_and_the_same_each_time(name: str) -> None:
    text = read_text(name)
    assert len(text.content) > 200_000
    assert text.sha256 == read_text(name).sha256


def test_held_out_text_is_not_the_calibration_text() -> None:
    assert not set(CALIBRATION_MODULES) & set(HELDOUT_MODULES)
    assert overlap(read_text("python-docs").content, read_text("python-heldout").content) < 0.005


def test_windows_are_disjoint_runs_of_the_text(ascending: Path) -> None:
    calibration = load_calibration(str(ascending), Characters(), samples=9, sequence_length=10, seed=3)
    assert calibration.tokens.shape == (9, 10)
    assert calibration.tokens.dtype == torch.int64
    assert (calibration.tokens.diff(dim=1) == 1).all()
    assert len(calibration.tokens.unique()) == 90
    assert not calibration.repeats


def test_seed_draws_the_windows(ascending: Path) -> None:
    first, again, other = (
        load_calibration(str(ascending), Characters(), samples=5, sequence_length=12, seed=seed).tokens
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_short_text_is_drawn_again_at_another_offset(ascending: Path) -> None:
    calibration = load_calibration(str(ascending), Characters(), samples=30, sequence_length=15, seed=0)
    assert calibration.repeats
    assert len(calibration.tokens.unique(dim=0)) > 6  # 100 // 15 disjoint windows, then others


def test_bos_begins_every_window_where_the_tokenizer_adds_it(ascending: Path) -> None:
    calibration = load_calibration(str(ascending), Characters(bos=True), samples=4, sequence_length=20, seed=0)
    assert calibration.bos
    assert calibration.tokens.shape == (4, 20)
    assert (calibration.tokens[:, 0] == 1).all()
    assert (calibration.tokens[:, 1:] >= 200).all()


def test_facts_are_plain_json(ascending: Path) -> None:
    calibration = load_calibration(str(ascending), Characters(), samples=2, sequence_length=20, seed=0)
    facts = json.loads(json.dumps(calibration.facts()))
    assert facts["sha256"] == read_text(str(ascending)).sha256
    assert (facts["samples"], facts["sequence_length"], facts["text_tokens"]) == (2, 20, 100)


def test_too_short_text_says_how_many_tokens(ascending: Path) -> None:
    with pytest.raises(UserError, match=r"has 100 tokens.* 128 needs 128"):
        load_calibration(str(ascending), Characters(), samples=1, sequence_length=128, seed=0)


def test_jsonl_documents_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    documents = ["one\nline", "two \u2028 separators"]
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents) + "\n", "utf-8")
    assert read_text(str(path)).content == "\n\n".join(documents)


@pytest.mark.parametrize("name", ["DOCUMENTS.JSONL", "documents.ndjson", "documents.txt", "documents", "c4.json"])
def test_json_lines_are_known_by_any_name(name: str, tmp_path: Path) -> None:
    """They were taken as plain text, and the model calibrated on JSON's syntax."""
    (tmp_path / name).write_text('{"text": "one"}\n\n{"text": "two", "url": "x"}\n')
    assert read_text(str(tmp_path / name)).content == "one\n\ntwo"


@pytest.mark.parametrize("content", ['{"text": "one"}\nplain', "{ braces }\n{ too }", "[1] a note", "7", '"quoted"'])
def test_text_that_looks_a_little_like_json_is_plain(content: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(content)
    assert read_text(str(tmp_path / "notes.txt")).content == content


def test_json_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps([{"text": "one"}], indent=1))
    with pytest.raises(UserError, match=r"all\.json is JSON, and not text: give JSON Lines"):
        read_text(str(tmp_path / "all.json"))
    (tmp_path / "other.txt").write_text('{"content": "one"}\n{"content": "two"}\n')
    with pytest.raises(UserError, match=r'other\.txt, line 1: not a JSON object with a string "text"'):
        read_text(str(tmp_path / "other.txt"))


@pytest.mark.parametrize("name", ["none.txt", "wikitext2:best", "no-text", "bad.jsonl"])
def test_a_text_is_checked_as_it_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("{}\n")
    sentences = []
    for look in (check_text, read_text):
        with pytest.raises(UserError) as caught:
            look(name)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1]


def test_a_text_of_the_hub_is_checked_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda _: True)
    check_text("wikitext2:test")
    check_text("python-docs")
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the `datasets` package"):
        check_text("c4")


@pytest.mark.parametrize(
    "line",
    [
        "{", '{"texts": "a"}', '{"text": 3}', "[1]", "3", '{"messages": []}', '{"messages": ["a"]}',
        '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": ["a"]}]}',
    ],
)  # fmt: skip
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        read_text(str(path))


@pytest.mark.parametrize(
    "line",
    [{"text": "cut \ud83d"}, {"messages": [{"role": "user", "content": "\ude00 cut"}]}],
    ids=["text", "messages"],
)
def test_half_of_a_character_names_the_line(tmp_path: Path, line: dict[str, object]) -> None:
    """Texts cut at any place of their UTF-16 have such halves, which no tokenizer takes."""
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 whole"}\n' + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"cut\.jsonl, line 2: it holds half of a surrogate pair"):
        read_text(str(path))


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"good \xff bad")
    with pytest.raises(UserError, match=r"not UTF-8 text .* byte 5"):
        read_text(str(path))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"wikitext3.*python-docs.*wikitext2"):
        read_text("wikitext3")


def test_unknown_split_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"no split 'test'.*train, validation"):
        read_text("c4:test")


@pytest.mark.parametrize("name", HUB_TEXTS)
def test_hub_text_without_the_package_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(module: str, *arguments: Any, **options: Any) -> Any:
        if module == "datasets":
            raise ImportError(module)
        return original(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"'\.\[datasets\]'.*general"):
        read_text(name)


def test_a_hub_out_of_reach_prints_no_tries(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    datasets, logger = pytest.importorskip("datasets"), logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr("lqexport.runtime.hub.no_hub", str)

    def load_dataset(*_: object, **__: object) -> None:
        logger.warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="no network"):
        read_text("wikitext2")
    assert not caplog.records
    logger.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]


@pytest.mark.parametrize("name", HUB_TEXTS)
def test_hub_text_offline_says_what_to_do(name: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"cannot be loaded from the hub.*general"):
        read_text(name)


@pytest.mark.parametrize("name", HUB_TEXTS)
def test_hub_text_asks_for_its_split_and_stops_at_its_limit(name: str) -> None:
    text = HUB_TEXTS[name]
    document = "x" * 100_000

    def load_dataset(path: str, name: str | None, *, split: str, **options: Any) -> Any:
        assert split == text.splits[0]
        assert "data_files" not in options or set(options["data_files"]) == {split}
        return ({text.column: document} for _ in range(200))

    documents = list(_hub_documents(load_dataset, text, text.splits[0]))
    assert len(documents) == (text.limit // len(document) if text.limit else 200)


def test_overlap_of_a_text_with_itself_and_with_another() -> None:
    text = read_text("python-docs").content[:20_000]
    assert overlap(text, text) == 1.0
    assert overlap(text, "  ".join(text.split())) == 1.0  # white space does not matter
    assert overlap(text, read_text("python-heldout").content[:20_000]) < 0.03
    half = text[:10_000] + read_text("python-heldout").content[:10_000]
    assert 0.4 < overlap(text, half) < 0.6
    assert overlap(text, "short") == 0.0


class TemplateTokenizer(Characters):
    """Renders a chat template as transformers does."""

    def __init__(self, chat_template: str | None) -> None:
        super().__init__()
        self.chat_template = chat_template

    def get_chat_template(self) -> str | None:
        return self.chat_template

    def apply_chat_template(self, messages: list[dict[str, str]], chat_template: str, tokenize: bool) -> str:
        assert not tokenize
        return str(render_jinja_template([messages], chat_template=chat_template)[0][0])


TURNS = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS


@pytest.mark.parametrize(
    ("template", "seen"),
    [
        (TURNS, "one\n\n<system>Be brief.<user>Hi<assistant>Yes?\n\ntwo"),
        (NO_SYSTEM, "one\n\n<user>Be brief.\n\nHi<assistant>Yes?\n\ntwo"),
        ("{{ raise_exception('no') }}", "one\n\nSystem: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\ntwo"),
        (None, "one\n\nSystem: Be brief.\n\nUser: Hi\n\nAssistant: Yes?\n\ntwo"),
        ("{{ strftime_now('%d %b %Y') }}", "one\n\n15 Jan 2025\n\ntwo"),
    ],
)
def test_conversations_are_in_the_models_chat_template(template: str | None, seen: str, tmp_path: Path) -> None:
    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?")]
    lines = [
        {"text": "one"},
        {"messages": [{"role": role, "content": said} for role, said in messages]},
        {"text": "two"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_text(str(path)).seen_by(TemplateTokenizer(template)) == seen
    calibration = load_calibration(str(path), TemplateTokenizer(template), samples=1, sequence_length=len(seen), seed=0)
    assert calibration.tokens.tolist() == [[ord(letter) for letter in seen]]
    assert calibration.sha256 == hashlib.sha256(seen.encode()).hexdigest()


def test_a_template_without_an_end_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    text = Text("chat", (({"role": "user", "content": "Hi"},),))
    with pytest.raises(UserError, match=r"does not come to an end: it took more than 0\.2 seconds"):
        text.seen_by(TemplateTokenizer(endless))


class Bytes(Characters):
    """A tokenizer that knows the letters of English and spells others in bytes."""

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})()


def test_languages_that_a_tokenizer_spells_are_left_out_of_the_general_text() -> None:
    text = read_text("general")
    seen = text.seen_by(Bytes())
    assert set(seen) < set(text.content)
    assert seen.isascii()
    assert len(seen) > 100_000
    assert text.seen_by(Characters()) == text.content


def test_a_file_is_seen_whole_and_so_is_a_text_of_which_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("é", encoding="utf-8")
    assert read_text(str(tmp_path / "text.txt")).seen_by(Bytes()) == "é"
    assert Text("general", ("é", "è"), fitted=True).seen_by(Bytes()) == "é\n\nè"
