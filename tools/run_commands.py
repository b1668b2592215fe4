"""Runs commands of lqexport one after the other, each in a fork of a process that has imported the large packages.

tools/compare_checkouts.py starts this script. Every line of standard input is one command, as JSON:

    [arguments of lqexport, folder to run in, file that the output is added to]

For every command, one line with its exit status is written to standard output. A fork has imported nothing of lqexport
yet, and runs `python -m lqexport` as a new process would, but saves the seconds that the imports take.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

# Imported for the forks. No tensor is computed here: a fork must not inherit running threads.
import numba  # noqa: F401
import torch  # noqa: F401
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM  # noqa: F401


def redirect_output(log: str) -> None:
    """Appends standard output and standard error of this process to the file `log`."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def read_commands() -> tuple[list[str], str, str] | None:
    """Forks for every line of standard input.

    Returns the command in each fork, and None in the first process at the end of the input.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            arguments, folder, log = json.loads(line)
            return arguments, folder, log
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


if __name__ == "__main__":
    tools_folder = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != tools_folder]
    if command := read_commands():
        arguments, folder, log = command
        redirect_output(log)
        os.chdir(folder)
        sys.argv = ["lqexport", *arguments]
        runpy.run_module("lqexport", run_name="__main__", alter_sys=True)
