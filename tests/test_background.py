"""Work beside the solver: finished tensors are written, and the next block is read ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lqexport.errors import UserError
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage import background
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.storage.background import BackgroundWorker, FileSpan, read_ahead
from lqexport.storage.tensor_files import spans


def test_one_thing_at_a_time_in_order() -> None:
    worker, gate, done = BackgroundWorker(), threading.Event(), []
    worker.start(lambda: (gate.wait(), done.append("first"))[1])
    assert done == []
    gate.set()
    worker.start(lambda: done.append("second"))
    assert done[0] == "first"
    worker.wait()
    assert done == ["first", "second"]


def test_what_goes_wrong_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensors").write_text("in the way")
    norm = StoredTensor("norm.weight", "F32", (2,), {"values": np.zeros(2, np.float32)})
    artifact.write_behind(norm)
    with pytest.raises(UserError, match=r"Cannot write .*norm.weight"):
        artifact.settle()
    artifact.settle()


def test_spans_are_where_the_bytes_are(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.arange(5, dtype=torch.int16)}
    save_file(tensors, tmp_path / "any.safetensors", {"format": "pt"})
    content = (tmp_path / "any.safetensors").read_bytes()
    byte_spans = spans(tmp_path / "any.safetensors")
    assert {name: content[start : start + size] for name, (start, size) in byte_spans.items()} == {
        name: tensor.numpy().tobytes() for name, tensor in tensors.items()
    }


def test_blocks_are_read_ahead_each_once(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block 1 is read ahead while block 0 is worked on, and nothing after the last block.

    A backward pass reads block 0 ahead.
    """
    read: list[FileSpan] = []
    monkeypatch.setattr(background, "_read", read.extend)
    source = open_source(str(tiny_model))
    second = [span for name in source.names() if ".layers.1." in name for span in source.file_spans(name)]
    assert second
    options = {"calibration": str(text), "samples": 2, "sequence_length": 32, "tune": 0}
    quantize(Recipe(str(tiny_model), "gguf:Q4_0", moments="normalized", prefix="full", **options), tmp_path / "forward")
    assert sorted(read) == sorted(second)
    read.clear()
    quantize(Recipe(str(tiny_model), "gguf:Q4_0", moments="guided", prefix="full", **options), tmp_path / "backward")
    first = {span for name in source.names() if ".layers.0." in name for span in source.file_spans(name)}
    assert first <= set(read)


def test_every_byte_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "any", []
    path.write_bytes(bytes(100))
    monkeypatch.setattr(background, "CHUNK", 16)
    monkeypatch.setattr(background.os, "preadv", lambda _, parts, at: reads.append((at, len(parts[0]))))
    background._read([FileSpan(path, 3, 40), FileSpan(tmp_path / "missing", 0, 5)])
    assert reads == [(3, 16), (19, 16), (35, 8)]


def test_weights_of_unknown_places_are_not_read_ahead() -> None:
    read_ahead(object(), ["any"])
