"""llama.cpp in a child process: an abort, a refusal, a hang or a kill is one sentence, and fails the file."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner
from verified_models import lossy as lossy
from verified_models import lossy_file as lossy_file
from verified_models import text as text

from lqexport.cli.app import app
from lqexport.errors import UserError
from lqexport.evaluation import engine_child, llamacpp_child, llamacpp_process
from lqexport.evaluation.engine_process import result_of
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.evaluation.llamacpp_process import LlamaCppFailed, LlamaCppProcess
from lqexport.verification.comparison import compare
from lqexport.verification.verifying import verify

EPSILON = "llama.attention.layer_norm_rms_epsilon"
TOKENS = list(range(40))


@pytest.fixture
def spoiled(lossy_file: Path, tmp_path: Path) -> Callable[[str, Any], Path]:
    """A function that copies the file with another value of a key, or of all elements of a list."""

    def spoil(key: str, value: Any) -> Path:
        path = tmp_path / "spoiled.gguf"
        shutil.copy(lossy_file, path)
        reader = gguf.GGUFReader(path, "r+")
        field = reader.fields[key]
        for part in field.data:
            field.parts[part][:] = value
        return path

    return spoil


def run(file: Path) -> None:
    with LlamaCppProcess(file, 64, threads=1) as engine:
        engine.logits(TOKENS)


@pytest.mark.llamacpp
def test_results_are_those_of_llamacpp_in_this_process(lossy_file: Path) -> None:
    with LlamaCpp(lossy_file, 64, threads=1) as here, LlamaCppProcess(lossy_file, 64, threads=1) as child:
        assert child.n_vocab == here.n_vocab
        assert child.warnings == []
        for tokens, first in ((TOKENS, 0), (TOKENS[::-1], 30)):
            assert np.array_equal(child.logits(tokens, first), here.logits(tokens, first))
        assert child.tokenize("Größe 12\n") == here.tokenize("Größe 12\n")


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        (EPSILON, -1.0, r"ended with SIGABRT when it ran .*spoiled\.gguf\. It printed: .*GGML_ASSERT\(eps >= 0"),
        ("tokenizer.ggml.tokens", ord("x"), r"ended with SIGABRT when it loaded .*GGML_ASSERT"),
        ("tokenizer.ggml.pre", ord("x"), r"cannot load .*unknown pre-tokenizer type"),
    ],
)
def test_a_file_that_llamacpp_does_not_survive(
    key: str, value: Any, sentence: str, spoiled: Callable[[str, Any], Path]
) -> None:
    with pytest.raises(LlamaCppFailed, match=sentence):
        run(spoiled(key, value))


@pytest.mark.llamacpp
def test_verify_fails_a_file_on_which_llamacpp_aborts(
    spoiled: Callable[[str, Any], Path], tiny_model: Path, text: str
) -> None:
    file = spoiled(EPSILON, -1.0)
    arguments = [str(file), "--against", str(tiny_model), "--text", text, "--windows", "1", "--engine", "llama.cpp"]
    result = CliRunner().invoke(app, ["verify", *arguments, "--json"])
    assert result.exit_code == 1, result.output
    content = json.loads(result.stdout)
    (failed,) = (sentence for sentence in content["failed"] if "GGML_ASSERT" in sentence)
    assert failed.startswith("llama.cpp ended with SIGABRT when it ran")
    assert content["evaluations"] == []
    with pytest.raises(UserError, match="GGML_ASSERT"):
        compare([file], str(tiny_model), text=text, windows=1, engine="llama.cpp")


@pytest.mark.llamacpp
def test_verify_fails_a_file_that_llamacpp_refuses(
    spoiled: Callable[[str, Any], Path], tiny_model: Path, text: str
) -> None:
    result = verify(spoiled("tokenizer.ggml.pre", ord("x")), str(tiny_model), text=text, windows=1, engine="llama.cpp")
    assert any("unknown pre-tokenizer type" in sentence for sentence in result.failed)


@pytest.mark.llamacpp
def test_warnings_of_llamacpp_are_passed_on_once(
    spoiled: Callable[[str, Any], Path], tiny_model: Path, text: str
) -> None:
    """The file is loaded twice, for its tokenizer and for its logits."""
    file = spoiled("tokenizer.ggml.eos_token_id", 100_000)
    result = verify(file, str(tiny_model), text=text, windows=1, engine="llama.cpp")
    warnings = [sentence for sentence in result.warnings if "bad special token" in sentence]
    assert len(warnings) == 1
    assert warnings[0].startswith("llama.cpp warns: ")


def test_warnings_of_one_sort_are_one_sentence() -> None:
    lines = [f"load: token {number} '<{number}|>' is odd" for number in range(9)]
    few = llamacpp_process._few([*lines, "a\x1b[2J", "load: default special token 7 is odd"])
    assert few == [
        "llama.cpp warns: load: token 0 '<0|>' is odd (and 8 more such lines)",
        "llama.cpp warns: a\\x1b[2J",
    ]
    assert len(llamacpp_process._few(list("abcdefgh"))) == llamacpp_process.WARNINGS


@pytest.mark.llamacpp
def test_a_killed_child_is_one_sentence(lossy_file: Path) -> None:
    with LlamaCppProcess(lossy_file, 64, threads=1) as engine:
        os.kill(engine._child.pid, signal.SIGKILL)
        with pytest.raises(LlamaCppFailed, match=r"ended with SIGKILL \(perhaps memory ran out\) when it ran"):
            engine.logits(TOKENS)


@pytest.mark.llamacpp
def test_a_child_that_hangs_is_ended(lossy_file: Path) -> None:
    with LlamaCppProcess(lossy_file, 64, threads=1) as engine:
        engine._patience = 0.2
        os.kill(engine._child.pid, signal.SIGSTOP)
        with pytest.raises(LlamaCppFailed, match=r"no sign of life for 0\.2 seconds"):
            engine.logits(TOKENS)
    assert engine._child.returncode == -signal.SIGKILL


@pytest.mark.llamacpp
def test_an_interrupt_ends_the_child(lossy_file: Path) -> None:
    """The interrupt comes while this process waits for an answer."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), LlamaCppProcess(lossy_file, 64, threads=1) as engine:  # noqa: PT012
            os.kill(engine._child.pid, signal.SIGSTOP)
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            engine.logits(TOKENS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert engine._child.returncode == -signal.SIGKILL


@pytest.mark.llamacpp
def test_a_child_outlives_no_parent(lossy_file: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lqexport.evaluation.llamacpp_process import LlamaCppProcess\n"
        "engine = LlamaCppProcess(Path(sys.argv[1]), 64)\n"
        "print(engine._child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.run([sys.executable, "-c", code, lossy_file], stdout=subprocess.PIPE, env=environment)
    child = int(parent.stdout)
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":  # ended, and waits for whoever adopted it
            return
        time.sleep(0.05)
    pytest.fail("The child is still alive.")


def test_the_child_imports_little() -> None:
    code = (
        "import sys, lqexport.evaluation.llamacpp_child; assert not {'torch', 'transformers', 'numba'} & {*sys.modules}"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_signs_of_life_come_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    answers = engine_child.Answers(stream)
    answers.alive()
    assert stream.getvalue() == b""
    monkeypatch.setattr(engine_child, "INTERVAL", 0.0)
    answers.alive()
    assert stream.getvalue().endswith(json.dumps({"alive": True}).encode())


def test_llamacpp_that_cannot_be_used_fails_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise UserError("It is another version.")

    monkeypatch.setattr(llamacpp_child, "echo_log", broken)
    stream = io.BytesIO()
    llamacpp_child.serve(iter([]), engine_child.Answers(stream))
    answer = json.loads(stream.getvalue()[engine_child.LENGTH.size :])
    with pytest.raises(UserError, match=r"It is another version\.") as raised:
        result_of(answer, LlamaCppFailed)
    assert not isinstance(raised.value, LlamaCppFailed)
