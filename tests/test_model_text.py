"""Texts that a model writes by itself, to calibrate on."""

from __future__ import annotations

import errno
import json
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from lqexport.calibration.model_text import beginnings, write_text
from lqexport.calibration.sequences import load_calibration
from lqexport.cli.app import app
from lqexport.errors import UserError
from lqexport.models.blocks import BlockModel
from lqexport.models.source import HuggingFaceSource, open_source
from lqexport.storage import files

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


def test_the_whole_model_is_that_of_transformers(tiny_model: Path) -> None:
    whole = BlockModel(open_source(str(tiny_model))).whole()
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, expected(ids).logits)


def test_texts_are_written_and_calibrate(tiny_model: Path, tmp_path: Path) -> None:
    path, again = tmp_path / "text.jsonl", tmp_path / "again.jsonl"
    options = ["--samples", "5", "--sequence-length", "24"]
    result = CliRunner().invoke(app, ["write-text", str(tiny_model), str(path), *options])
    assert result.exit_code == 0, result.output
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == 5
    write_text(str(tiny_model), again, samples=5, sequence_length=24, device="cpu")
    assert again.read_bytes() == path.read_bytes()
    tokenizer = open_source(str(tiny_model)).tokenizer()
    assert load_calibration(str(path), tokenizer, samples=2, sequence_length=16, seed=0).tokens.shape == (2, 16)
    with pytest.raises(UserError, match="exists"):
        write_text(str(tiny_model), path)


def test_a_text_that_cannot_be_written_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be read is named by itself, and not as the text that cannot be written."""
    path, whole = tmp_path / "text.jsonl", BlockModel.whole
    write = partial(write_text, str(tiny_model), path, samples=2, sequence_length=8, device="cpu")
    full, unreadable = OSError(errno.ENOSPC, "No space left"), OSError(errno.EIO, "Input/output error", "a/shard")
    disk_is_full = pytest.raises(UserError, match=r"disk is full: cannot write .*text\.jsonl")
    with disk_is_full, mock.patch.object(files.os, "fsync", side_effect=full):
        write()
    with (
        pytest.raises(UserError, match=r"^a/shard: Input"),
        mock.patch.object(BlockModel, "whole", side_effect=unreadable),
    ):
        write()
    assert list(tmp_path.iterdir()) == []

    def meanwhile(self: BlockModel) -> PreTrainedModel:
        path.write_text("another's")
        return whole(self)

    monkeypatch.setattr(BlockModel, "whole", meanwhile)
    with pytest.raises(UserError, match=r"text\.jsonl exists"):
        write()
    assert path.read_text() == "another's"


def test_half_of_the_texts_are_conversations(tiny_model: Path) -> None:
    tokenizer = open_source(str(tiny_model)).tokenizer()
    assert len(beginnings(tokenizer, 1000, 6, 0)) == 6
    tokenizer.chat_template = TEMPLATE
    starts = beginnings(tokenizer, len(tokenizer), 6, 0)
    user = tokenizer("<|user|>", add_special_tokens=False).input_ids
    assert starts[3:] == [user] * 3
    assert all(len(start) < len(user) and start[-1] not in tokenizer.all_special_ids for start in starts[:3])
    assert starts == beginnings(tokenizer, len(tokenizer), 6, 0) != beginnings(tokenizer, len(tokenizer), 6, 1)


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "no message in it"])
def test_a_template_that_renders_no_message_gives_no_conversations(tiny_model: Path, template: str) -> None:
    tokenizer = open_source(str(tiny_model)).tokenizer()
    expected = beginnings(tokenizer, 512, 4, 0)
    tokenizer.chat_template = template
    assert beginnings(tokenizer, 512, 4, 0) == expected


def test_texts_longer_than_the_beginning_of_a_conversation_are_wanted(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = open_source(str(tiny_model)).tokenizer()
    tokenizer.chat_template = "a long beginning of every conversation " + TEMPLATE
    with (
        mock.patch.object(HuggingFaceSource, "tokenizer", return_value=tokenizer),
        pytest.raises(UserError, match="texts need a larger --sequence-length"),
    ):
        write_text(str(tiny_model), tmp_path / "text.jsonl", samples=2, sequence_length=8, device="cpu")
    assert not list(tmp_path.iterdir())
