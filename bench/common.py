"""What several scripts of this folder share: their command lines, the digests of an artifact, the times in its log.

Imports the standard library alone, so that a script which only starts commands stays small. A script that runs as
`python bench/NAME.py` finds this module beside itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path


def comparison_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser for MODEL, `--calibration` and `--evaluation`, the arguments of a script that compares methods."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    return parser


def split_arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this script, and those after `--`, which it hands on to a command of lqexport."""
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    return parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of an artifact but the log, which holds times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def solving_seconds(artifact: Path) -> float:
    """Seconds that a run solved its linears for, writing included, summed up from the artifact's log."""
    log = (artifact / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line).get("seconds", 0.0) for line in log)
