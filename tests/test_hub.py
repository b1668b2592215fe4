"""A hub out of reach is said in one sentence, quickly, and what the cache holds is read without it."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from lqexport.calibration.texts import HUB_TEXTS, read_text
from lqexport.cli.app import app
from lqexport.errors import UserError
from lqexport.models.source import open_source
from lqexport.runtime import hub

CLOSED = r"http://127\.0\.0\.1:\d+ cannot be reached \(Connection refused\)\."


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "getproxies", dict)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket that listens, and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed(server: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port that is closed, which is that of the hub, with an empty cache."""
    endpoint = address(server)
    server.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("The hub's client tried again."))
    return endpoint


@pytest.mark.parametrize("name", HUB_TEXTS)
@pytest.mark.usefixtures("closed")
def test_a_text(name: str) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=rf"^The text {name} cannot be loaded from the hub: {CLOSED} Give a local"):
        read_text(name)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("closed")
def test_a_model() -> None:
    result = CliRunner().invoke(app, ["quantize", "me/model", "out", "--target", "gguf:Q4_0"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    with pytest.raises(UserError, match=f"no folder me/model, and the hub has no such model within reach: {CLOSED}$"):
        open_source("me/model")


@pytest.mark.usefixtures("closed")
def test_a_model_in_the_cache_is_read_without_the_hub(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--me--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("0" * 40)).symlink_to(tiny_model)
    assert open_source("me/model").names() == open_source(str(tiny_model)).names()


def test_a_hub_that_is_not_asked(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.no_hub().startswith(closed)
    with monkeypatch.context() as patch:
        patch.setattr(urllib.request, "getproxies", lambda: {"http": "http://proxy.invalid"})
        patch.setattr(urllib.request, "proxy_bypass", lambda host: False)
        assert hub.no_hub() == ""
        patch.setattr(urllib.request, "proxy_bypass", lambda host: True)
        assert hub.no_hub().startswith(closed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.no_hub() == "HF_HUB_OFFLINE is set."
    with hub.hub():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE


def test_a_server_that_accepts_connections_is_within_reach(server: socket.socket) -> None:
    assert hub.unreachable(address(server)) == ""
    assert "cannot be reached" in hub.unreachable("http://127.0.0.1:port")


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def wait(*_: object) -> None:
        answered.wait()
        raise socket.gaierror

    monkeypatch.setattr(socket, "create_connection", wait)
    assert hub.unreachable("https://hub", limit=0.01) == "https://hub cannot be reached (it does not answer)."
    answered.set()
