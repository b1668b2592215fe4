"""llama.cpp's server as a child process: it ends with its owner, and what goes wrong there is one sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from llama_files import byte_level_bpe, export, make_model

from lqexport.errors import UserError
from lqexport.evaluation import llama_server, llamacpp
from lqexport.evaluation.llama_server import LlamaServer, ServerRefused
from lqexport.evaluation.llamacpp_process import LlamaCppFailed

pytestmark = pytest.mark.llamacpp


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("file"), make_model(), "gguf:F16", byte_level_bpe())


@pytest.fixture(scope="module")
def server(file: Path) -> LlamaServer:
    with LlamaServer(file, 64) as started:
        yield started


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(process: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(process)


def test_greedy_tokens_are_those_of_the_logits(server: LlamaServer, file: Path) -> None:
    prompt = server.tokenize("def add(a, b):")
    with llamacpp.LlamaCpp(file, 64, threads=1) as engine:
        expected = list(prompt)
        for _ in range(6):
            expected.append(int(engine.logits(expected)[-1].argmax()))
    assert server.continuation(prompt, 6) == expected[len(prompt) :]


def test_stop_tokens(server: LlamaServer) -> None:
    assert server.stops_at(2, [5])
    assert not server.stops_at(7, [5])


def test_what_it_refuses_is_its_own_sentence(server: LlamaServer) -> None:
    with pytest.raises(ServerRefused, match="exceeds the available context size"):
        server.continuation([5] * 500, 4)


def test_it_ends_with_close(file: Path) -> None:
    server = LlamaServer(file, 64)
    process = server._child.pid
    assert is_alive(process)
    server.close()
    server.close()
    assert ended(process)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_it_ends_with_a_killed_owner(file: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom lqexport.evaluation.llama_server import LlamaServer\n"
        "print(LlamaServer(Path(sys.argv[1]), 64)._child.pid, flush=True)\ntime.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    process = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert ended(process)


def send(number: signal.Signals, pid: int, status: str) -> None:
    """Sends a signal to a process, and waits until the process has the status that it brings."""
    os.kill(pid, number)
    until = time.monotonic() + 20
    while psutil.Process(pid).status() != status and time.monotonic() < until:
        time.sleep(0.01)


def test_a_crash_and_a_hang_are_sentences(file: Path) -> None:
    with LlamaServer(file, 64) as server:
        send(signal.SIGKILL, server._child.pid, psutil.STATUS_ZOMBIE)
        with pytest.raises(LlamaCppFailed, match=r"server ended with SIGKILL .* when it used .*It printed: "):
            server.tokenize("a")
    with LlamaServer(file, 64, patience=0.5) as server:
        send(signal.SIGSTOP, server._child.pid, psutil.STATUS_STOPPED)
        with pytest.raises(LlamaCppFailed, match=r"server did not use .* within 0.5 seconds"):
            server.tokenize("a")


def test_a_file_that_it_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(LlamaCppFailed, match=r"server ended with exit status 1 when it loaded .*no\.gguf"):
        LlamaServer(tmp_path / "no.gguf", 64)


def test_no_server(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "server_binary", lambda: None)
    with pytest.raises(UserError, match=r"llama\.cpp is not installed"):
        LlamaServer(file, 64)


def test_options_of_the_environment_do_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_HOST", "192.0.2.1")
    monkeypatch.setenv("LLAMA_ARG_CHAT_TEMPLATE", "chatml")
    environment = llama_server._environment(Path("/a/bin/llama-server"))
    assert not [name for name in environment if name.startswith("LLAMA_")]
    assert environment["LD_PRELOAD"].startswith("/a/lib/libllama.so.0")
