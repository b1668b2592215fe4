"""The evaluation texts of bench/: how they are written, and that the built-in text shares nothing with them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lqexport.calibration.texts import plain, read_text

WORDS = 8
"""Words in a row that no two texts written apart from each other share."""


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


@pytest.fixture
def written(
    load_script: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[Path, str]:
    """The folder that the script writes, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["evaluation_texts.py", str(tmp_path / "texts")])
    load_script("bench/evaluation_texts.py").main()
    return tmp_path / "texts", capsys.readouterr().out


def test_the_texts_are_written_with_their_digests(written: tuple[Path, str]) -> None:
    folder, printed = written
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["chat.jsonl", "code.txt"]
    assert printed.splitlines() == [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f}" for f in files]


def test_general_shares_no_run_of_words_with_the_conversations(written: tuple[Path, str]) -> None:
    documents = [plain(document) for document in read_text(str(written[0] / "chat.jsonl")).documents]
    assert len(documents) == len(set(documents)) >= 60
    general = set().union(*(_runs(plain(document)) for document in read_text("general").documents))
    assert not [run for document in documents for run in _runs(document) & general]


def test_the_code_holds_both_languages_from_the_start(written: tuple[Path, str]) -> None:
    """A few windows are measured, so the sources take turns."""
    content = (written[0] / "code.txt").read_text(encoding="utf-8")
    assert 100_000 < len(content) < 200_000
    for start in (0, 20_000):
        part = content[start : start + 12_000]
        assert "\ndef " in part or "    def " in part
        assert "::" in part
