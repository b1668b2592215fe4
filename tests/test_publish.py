"""`push-to-hub`, tested with a local server that answers as the Hugging Face hub's API does."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.folders import native
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.errors import UserError
from lqexport.storage.artifact import Artifact
from lqexport.verification.publish import push_to_hub, save_record, upload_list
from lqexport.verification.verifying import verify

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """A local hub: its repositories and the files committed to each. Files over 1 kB are uploaded as large files.

    private   repository -> whether it is private
    stored    sha256 -> content of an uploaded large file
    files     repository -> path -> content
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.files: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub."""

    server: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def allowed(self) -> bool:
        """Whether the token is the right one. If not, the hub's error is sent."""
        right = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not right:
            self.answer({"error": "Invalid username or password."}, 401)
        return right

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if self.allowed:
            self.answer({"id": name, "private": self.server.private[name], "tags": [], "siblings": []})

    def do_PUT(self) -> None:
        self.server.stored[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if not self.allowed:
            return
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request['organization']}/{request['name']}"
            private = request.get("private", request.get("visibility") == "private")
            self.server.private.setdefault(name, private)
            self.answer({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > 1000 else "regular"} for f in files]
            self.answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            self.commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)

    def commit(self, name: str, body: bytes) -> None:
        files = self.server.files.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/1", "commitOid": "1"})


@pytest.fixture
def hub(served: Callable[[Hub], Hub], monkeypatch: pytest.MonkeyPatch) -> Hub:
    server = served(Hub())
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


@pytest.fixture(scope="module")
def verified(
    rounded_artifact: Callable[..., Artifact], tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A .gguf file, and the record of its verification, made by the command line."""
    base = tmp_path_factory.mktemp("publish")
    gguf_writer.write(rounded_artifact(base / "artifact", "gguf:F16"), base / "tiny.gguf")
    common = [str(base / "tiny.gguf"), "--against", str(tiny_model), "--text", str(text), "--windows", "1"]
    done = CliRunner().invoke(app, ["verify", *common, "--record", str(base / "record")])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"Wrote {base / 'record'}.\n")
    return base / "tiny.gguf", base / "record"


def test_the_command_uploads_file_and_record_in_one_commit(verified: tuple[Path, Path], hub: Hub) -> None:
    file, record = verified
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "lqexport", "push-to-hub", file, "me/tiny", "--record", record]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/me/tiny/commit/1" in done.stdout
    assert hub.private == {"me/tiny": True}
    expected = {path.name: path.read_bytes() for path in (file, *record.iterdir())}
    assert {"tiny.gguf", "README.md", "verification.json", "report.html"} == expected.keys()
    assert hub.files["me/tiny"] == expected
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(expected["verification.json"])["files"] == {"tiny.gguf": digest}


def test_a_dry_run_lists_files(verified: tuple[Path, Path]) -> None:
    file, record = verified
    done = CliRunner().invoke(app, ["push-to-hub", str(file), "me/tiny", "--record", str(record), "--dry-run"])
    assert done.exit_code == 0, done.output
    for name in ("tiny.gguf", "README.md", "verification.json", "4 files; nothing was uploaded"):
        assert name in done.stdout
    refused = CliRunner().invoke(app, ["push-to-hub", str(file), "me/tiny/1", "--record", str(record), "--dry-run"])
    assert (refused.exit_code, "No repository can be called 'me/tiny/1'" in refused.stderr) == (2, True)


def test_a_public_repository_must_be_meant(verified: tuple[Path, Path], hub: Hub) -> None:
    file, record = verified
    hub.private["me/shown"] = False
    with pytest.raises(UserError, match="me/shown is public"):
        push_to_hub(file, "me/shown", record=record)
    assert hub.files == {}


def test_what_the_hub_says_is_told(verified: tuple[Path, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    file, record = verified
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(UserError, match=r"did not take .* as me/tiny: .*401.*hf auth login"):
        push_to_hub(file, "me/tiny", record=record)
    with pytest.raises(UserError, match=r"No repository can be called 'a/b/c'") as refused:
        push_to_hub(file, "a/b/c", record=record)
    assert "auth login" not in str(refused.value)


@pytest.mark.parametrize("offline", [True, False])
def test_a_missing_network_is_not_a_missing_login(
    offline: bool, verified: tuple[Path, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, record = verified
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=r"^The hub cannot be reached, .* Check the network and HF_HUB_OFFLINE") as said:
        push_to_hub(file, "me/tiny", record=record)
    assert "auth login" not in str(said.value)


def test_an_unverified_file_is_refused(
    verified: tuple[Path, Path], tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    file, record = verified
    with pytest.raises(UserError, match="No record says"):
        upload_list(file)
    with pytest.raises(UserError, match="no record of a verification"):
        upload_list(file, record=tmp_path)
    (tmp_path / "verification.json").write_text('{"passed": true, "adapter": 1, "files": []}')
    with pytest.raises(UserError, match="damaged, or of another form"):
        upload_list(file, record=tmp_path)
    changed = tmp_path / file.name
    changed.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"not of these files: tiny\.gguf is another"):
        upload_list(changed, record=record)
    assert upload_list(changed, record=record, unverified=True)["tiny.gguf"] == changed
    assert upload_list(changed, unverified=True) == {"tiny.gguf": changed}
    with pytest.raises(UserError, match="no written model"):
        upload_list(file.with_name("artifact"), unverified=True)
    common = ["verify", str(file), "--against", str(tiny_model), "--text", str(text), "--windows", "1"]
    failed = CliRunner().invoke(app, [*common, "--max-perplexity-ratio", "0.1", "--record", str(tmp_path / "failed")])
    assert failed.exit_code == 1
    with pytest.raises(UserError, match=r"failed its verification: .*above the limit of 0\.1"):
        upload_list(file, record=tmp_path / "failed")


def test_every_file_of_a_folder_is_of_the_record(
    rounded_artifact: Callable[..., Artifact], tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    native.write(rounded_artifact(tmp_path / "artifact", "native:table-3", 4), tmp_path / "folder")
    save_record(verify(tmp_path / "folder", str(tiny_model), text=str(text), windows=1), tmp_path / "record")
    listed = upload_list(tmp_path / "folder", record=tmp_path / "record")
    assert {"config.json", "model.safetensors", "tokenizer.json", "lqexport/manifest.json", "README.md"} <= set(listed)
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "folder" / "extra.py").write_text("")
    with pytest.raises(UserError, match=r"config\.json, extra\.py is another"):
        upload_list(tmp_path / "folder", record=tmp_path / "record")
