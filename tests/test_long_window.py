"""The loss by position in one long window: right files pass, and what is wrong beyond short windows is found."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from spoiled_files import gguf_file, save_sharp

from lqexport.calibration.texts import Text, read_text
from lqexport.models.source import open_source
from lqexport.verification import long_window, report
from lqexport.verification.long_record import LongWindow, PositionRange
from lqexport.verification.long_window import _ranges, _window, check_long_window
from lqexport.verification.result import Verification
from lqexport.verification.verifying import verify

WINDOW = "gemma2.attention.sliding_window"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 that was trained on 1024 positions, with windows of 700."""
    return save_sharp(tmp_path_factory.mktemp("models") / "long", "gemma2-long", tiny_model)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text("python-heldout").content[:12_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def right(model: Path, heldout: str, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    path = gguf_file(model, tmp_path_factory.mktemp("right"), "gguf:Q8_0")
    return verify(path, str(model), text=heldout, windows=1, long=True)


def test_a_right_file_passes_and_all_is_shown(right: Verification) -> None:
    assert right.failed == []
    assert right.long is not None
    assert (right.long.tokens, right.long.because) == (1024, "the length that the model was trained on")
    assert [entry.first for entry in right.long.ranges] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [entry.positions for entry in right.long.ranges][-3:] == [128, 128, 128]
    assert right.long.ranges[-1].last == 1022
    assert all(entry.kl == pytest.approx(entry.expected, rel=0.5) for entry in right.long.ranges[5:])
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(report.for_terminal(right))
    assert "one window of 1024 tokens (the length that the model was trained on)" in console.export_text()
    assert "512 to 1022" in report.as_html(right)
    assert right.as_json()["long"]["ranges"][-1]["last"] == 1022


@pytest.mark.llamacpp
def test_llamacpp_loses_what_rounding_does(right: Verification, model: Path, heldout: str) -> None:
    result = verify(right.file, str(model), text=heldout, windows=1, long=True, engine="llama.cpp")
    assert result.failed == []
    assert result.long is not None
    assert all(entry.kl == pytest.approx(entry.expected, rel=0.5) for entry in result.long.ranges[5:])


def test_a_window_that_is_wrong_beyond_short_windows_is_found(model: Path, heldout: str, tmp_path: Path) -> None:
    path = gguf_file(model, tmp_path, "gguf:Q8_0", keys={WINDOW: 520})
    short = verify(path, str(model), text=heldout, windows=1)
    assert [sentence for sentence in short.failed if "sliding_window" not in sentence] == []
    setting, by_position = verify(path, str(model), text=heldout, windows=1, long=True).failed
    assert "sliding_window 520" in setting
    assert by_position.startswith("From position 512 of a long window on, mean KL divergence is ")


def test_what_decides(right: Verification) -> None:
    """Late positions may lose three times what rounding costs there, and what the early ones lose beyond that."""

    def failures(*losses: tuple[int, float, float | None]) -> int:
        ranges = [PositionRange(first, 2 * first - 1, 9, kl, expected) for first, kl, expected in losses]
        result = dataclasses.replace(right, failed=[], long=LongWindow(999, "", ranges))
        check_long_window(result)
        return len(result.failed)

    assert failures((16, 9.0, 0.01), (32, 0.01, 0.01), (64, 0.029, 0.01)) == 0
    assert failures((32, 0.01, 0.01), (64, 0.031, 0.01)) == 1
    assert failures((32, 0.1, 0.01), (64, 0.25, 0.01)) == 0
    assert failures((32, 1e-6, 1e-6), (64, 9e-5, 1e-6)) == 0
    assert failures((32, 0.01, None), (64, 9.0, None)) == 0


def test_ranges() -> None:
    assert [(first, last, len(scored)) for first, last, scored in _ranges(4)] == [(1, 1, 1), (2, 2, 1)]
    ranges = _ranges(3000)
    assert np.concatenate([scored for *_, scored in ranges[:8]]).tolist() == list(range(1, 256))
    assert [(first, last) for first, last, _ in ranges[-2:]] == [(1024, 2047), (2048, 2998)]
    assert all(scored[0] == first and scored[-1] == last for first, last, scored in ranges)


def test_what_limits_the_window(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(model))
    text = Text("a", (read_text("python-heldout").content[:500],))
    because = _window(source.tokenizer(), text, source.config)[1]
    assert because == "the length of the text"
    monkeypatch.setattr(long_window, "_tokens_in_memory", lambda config: 100)
    window, because = _window(source.tokenizer(), text, source.config)
    assert (len(window), because) == (100, "free memory")


def test_long_models_need_memory(model: Path) -> None:
    small = open_source(str(model)).config
    large = small | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    assert long_window._tokens_in_memory(large) < long_window._tokens_in_memory(small)
