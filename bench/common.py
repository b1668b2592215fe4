"""Functions that several scripts of this folder share: command lines, an artifact's digests, the times in its
log, files that lqexport makes, what a process takes.

This module only imports the standard library, so a script that only starts commands stays small. Python finds it beside
the script that runs as `python bench/NAME.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


def comparison_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with MODEL, `--calibration` and `--evaluation`, for scripts that compare methods."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    return parser


def split_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments of this script, and those after `--`, which the script passes to an lqexport command."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]


def solved(model: str, out: Path, writer: str, options: list[str]) -> Path:
    """Makes a file or folder by lqexport, unless it exists.

    writer    the command that writes it from an artifact, such as `to-gguf`
    options   those of `quantize`
    """
    artifact, command = out.with_name(f"{out.name}-artifact"), [sys.executable, "-m", "lqexport"]
    if not out.exists():
        subprocess.run([*command, "quantize", model, str(artifact), *options], check=True)
        subprocess.run([*command, writer, str(artifact), str(out)], check=True)
    return out


def written_bytes(written: Path) -> int:
    """Returns the bytes of a file, or of the tensors' files of a folder."""
    return written.stat().st_size if written.is_file() else sum(f.stat().st_size for f in written.glob("*.safetensors"))


def digests(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file of an artifact except the log, which holds times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def solving_seconds(artifact: Path) -> float:
    """Returns the seconds for which a run solved and wrote its linears: the sum over the artifact's log."""
    log = (artifact / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line).get("seconds", 0.0) for line in log)


class Taken(NamedTuple):
    """The time and the memory that a finished process took.

    seconds   user and system time, of its children, too
    peak      bytes of its resident memory at most
    """

    seconds: float
    peak: int


def taken_by(command: list[str], log: Path, environment: Mapping[str, str] = os.environ) -> Taken:
    """Runs a command, whose output goes to the end of a log. Ends this script if the command fails."""
    with log.open("ab") as file:
        actions = [(os.POSIX_SPAWN_DUP2, file.fileno(), stream) for stream in (1, 2)]
        child = os.posix_spawn(command[0], command, environment, file_actions=actions)
        _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with status {status}: see {log}.")
    return Taken(usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
