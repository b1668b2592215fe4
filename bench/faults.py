"""Injects faults of disk, clock and process at every file operation of a run, and checks that nothing is lost.

    python bench/faults.py --work FOLDER [--only NAME] [--faults kill,full] [--every 1] [--first 1]

A tiny random model is quantized and exported in a process in which bench/faults.c counts every read and every change of
a file under the output folder. Then each operation is hit in turn (with --every N --first K: the K-th and every N-th
after it):

    kill        the process ends before the operation, as by kill -9
    interrupt   Ctrl-C is pressed at the operation
    tear        the process ends in the middle of a write
    full        the disk is full from this operation on
    unreadable  the read fails (EIO)

A full disk and a failed read must end in a UserError or have no effect, and Ctrl-C in a KeyboardInterrupt. After every
fault, no file with a final name may be half-written, and running the same command again must write exactly the bytes of
an undisturbed run. The same is checked for two runs at once in one folder, and for a clock that jumps back at every
call. Prints a line per command and fault. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # no large module may be imported before faults.c is loaded
    from lqexport.recipe import Recipe

Command = Callable[[], object]
"""A command, which writes into the folder `out` of the working folder."""

FAULTS = {"kill": 1, "tear": 2, "full": 3, "unreadable": 4, "interrupt": 6}
OFF, CLOCK = 0, 5
KILLED, REFUSED, BROKEN, STOPPED = 137, 2, 3, 130
"""The exit statuses of a killed process, after a UserError, after any other exception, and after Ctrl-C."""
ALLOWED = {"kill": (KILLED,), "tear": (KILLED,), "interrupt": (STOPPED,)}
"""Fault -> the exit statuses that it may have; the others must be refused or have no effect."""
SOURCE = Path(__file__).with_suffix(".c")


def preload(work: Path) -> None:
    """Compiles faults.c and restarts this program with it preloaded."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    library = work / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    # Runs are forked from a process that has run all commands before, so it must have no threads.
    alone = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    alone["NUMBA_THREADING_LAYER"] = "workqueue"
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **alone, "LD_PRELOAD": str(library)})


def recipes(work: Path) -> dict[str, Recipe]:
    """Returns recipes by a short name: every family of targets, rounded, corrected, and with types chosen by size."""
    from fuzz import make_model

    from lqexport.calibration.texts import read_text
    from lqexport.pipeline import tune_model
    from lqexport.planning import calibration_text
    from lqexport.recipe import Recipe
    from lqexport.tuning import tune

    for module in (calibration_text, tune_model, tune):
        module.HELD_OUT = 1  # each held-out sequence reads every tensor once more before and after tuning
    text, model = work / "text.txt", str(make_model(work / "model"))
    text.write_text(read_text("python-docs").content[:20_000], encoding="utf-8")
    few: dict[str, Any] = {"calibration": str(text), "samples": 2, "sequence_length": 16, "descent": 1}
    return {
        "gguf": Recipe(model, "gguf:Q4_0", tune=4, **few),
        "exl2": Recipe(model, "exl2", bits=4.5, tune=0, **few),
        "native": Recipe(model, "native:table-3", tune=4, **few),
        "gptq": Recipe(model, "gptq:4-g32", method="rtn"),
        "corrected": Recipe(model, "gguf:Q5_0", rank=4, tune=0, **few),
        "auto": Recipe(model, "gguf:auto", size="7bpw", tune=0, **few),
    }


def commands(work: Path, only: str) -> dict[str, Command]:
    """Returns every command that writes a model and whose name contains `only`, on a tiny model.

    It makes the artifacts to export, without faults.
    """
    from lqexport.calibration.model_text import write_text
    from lqexport.delivery.deliver import export_model
    from lqexport.delivery.ladder import make_ladder
    from lqexport.exporting import export
    from lqexport.pipeline.quantize import quantize

    by_name, folder, file = recipes(work), work / "out" / "model", work / "out" / "model.gguf"
    result: dict[str, Command] = {}
    for name, recipe in by_name.items():
        result[f"quantize {recipe.target}"] = partial(quantize, recipe, work / "out" / name)
    measured: dict[str, Any] = {"text": str(work / "text.txt"), "windows": 1, "engine": "lqexport", "device": "cpu"}
    # The artifact stays: while it is deleted the file has its name, so the command would be refused afterwards.
    result["export"] = partial(export_model, by_name["gguf"], file, keep_artifact=True, **measured)
    result["ladder"] = partial(make_ladder, by_name["gguf"], work / "out", ["Q4_0"], **measured)
    texts = work / "out" / "texts.jsonl"
    result["write-text"] = partial(write_text, str(work / "model"), texts, samples=2, sequence_length=24, device="cpu")
    exports: dict[str, tuple[str, Path, dict[str, Any]]] = {
        "to-gguf": ("auto", file, {}),
        "to-gguf in files": ("auto", file, {"split_max_size": "30K"}),
        "to-gguf and adapter": ("corrected", file, {"adapter": file.with_name("adapter.gguf")}),
        "to-peft": ("corrected", folder, {"format": "peft"}),
        "to-exl2": ("exl2", folder, {}),
        "to-native": ("native", folder, {}),
        "to-gptq": ("gptq", folder, {}),
        "to-compressed-tensors": ("gptq", folder, {"format": "compressed-tensors"}),
    }
    for name, (artifact, path, options) in exports.items():
        if only in name:
            quantize(by_name[artifact], work / artifact)
        result[name] = partial(export, work / artifact, path, **options)
    return {name: command for name, command in result.items() if only in name}


class Sweep:
    """All faults of one command.

    watched   the folder whose files faults happen on
    root      the folder in it that only the command writes into
    """

    def __init__(self, command: Command, watched: Path) -> None:
        self.command, self.watched, self.root = command, str(watched).encode(), watched / "out"
        self.library = ctypes.CDLL(None)
        self.wrong: list[str] = []
        self.finished_from: set[frozenset[tuple[str, str]]] = set()
        self.clear()
        command()
        self.expected = digests(self.root)

    def clear(self) -> None:
        """Empties the folder."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)

    def fork(self, mode: int, number: int) -> int:
        """Forks a child that runs the command under a fault and exits with its status. Returns the process id."""
        gc.freeze()  # the child does not copy memory that the garbage collector would touch
        if child := os.fork():
            return child
        status = BROKEN
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
        try:
            self.library.faults_arm(self.watched, mode, ctypes.c_long(number))
            status = attempt(self.command)
            for thread in threading.enumerate():  # as at the end of a process
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            self.library.faults_arm(b"", OFF, ctypes.c_long(0))
        finally:
            os._exit(status)

    def run(self, mode: int, number: int = 0) -> int:
        """Runs the command under a fault. Returns its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.fork(mode, number), 0)[1])

    def operations(self, mode: int) -> int:
        """Returns the number of operations that a fault could hit."""
        self.clear()
        self.library.faults_arm(self.watched, OFF, ctypes.c_long(0))
        self.command()
        return int(self.library.faults_counted(mode))

    def hit(self, fault: str, number: int) -> int:
        """Hits one operation, checks the files, and runs again. Returns the exit status under the fault."""
        self.clear()
        status = self.run(FAULTS[fault], number)
        self.check(status in ALLOWED.get(fault, (0, REFUSED)), f"{fault} {number}: exit status {status}")
        self.check(not (half := damaged(self.root)), f"{fault} {number}: half-written {half}")
        self.check_finishes(f"{fault} {number}")
        return status

    def check_finishes(self, fault: str) -> None:
        """Runs the command undisturbed if it had not finished. The files must be those of an undisturbed run.

        Faults often leave the same files. From each set of files, the command runs once.
        """
        left = frozenset(digests(self.root).items())
        if left in self.finished_from:
            return
        self.finished_from.add(left)
        if self.unexpected():
            status = self.run(OFF)
            self.check(status == 0, f"{fault}: exit status {status} afterwards")
        self.check(not (files := self.unexpected()), f"{fault}: afterwards not as without the fault: {files[:5]}")

    def unexpected(self) -> list[str]:
        """Returns the files that are missing, superfluous, or different from those of an undisturbed run."""
        return sorted(dict(digests(self.root).items() ^ self.expected.items()))

    def at_once(self) -> list[int]:
        """Starts two runs at once; one of them may be refused. Returns their exit statuses."""
        self.clear()
        children = [self.fork(OFF, 0) for _ in range(2)]
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        self.check(statuses in ([0, 0], [0, REFUSED]), f"two at once: exit statuses {statuses}")
        self.check_finishes("two at once")
        return statuses

    def clock(self) -> None:
        """Runs the command while the clock jumps back at every call."""
        self.clear()
        self.check(self.run(CLOCK) == 0, "clock: does not run")
        self.check(not (files := self.unexpected()), f"clock: other bytes in {files[:5]}")

    def check(self, good: bool, sentence: str) -> None:
        """Records and prints the sentence if the check failed."""
        if not good:
            self.wrong.append(sentence)
            print(f"WRONG {sentence}", flush=True)


def attempt(run: Command) -> int:
    """Runs a command. Returns the exit status that stands for how it ended."""
    from lqexport.errors import UserError

    try:
        run()
    except UserError:
        return REFUSED
    except KeyboardInterrupt:
        return STOPPED
    except BaseException:
        traceback.print_exc(limit=-6)
        return BROKEN
    return 0


def digests(root: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a folder. The log, which holds times, and folders count as empty."""

    def content(path: Path) -> bytes:
        return path.read_bytes() if path.is_file() and path.name != "log.jsonl" else b""

    return {str(path.relative_to(root)): sha256(content(path)).hexdigest() for path in root.rglob("*")}


def damaged(root: Path) -> list[str]:
    """Returns the files with a final name that are not whole, as far as their type shows it."""
    files = [path for path in root.rglob("*") if path.is_file() and ".part" not in str(path)]
    return [str(path.relative_to(root)) for path in files if not is_whole(path)]


def is_whole(path: Path) -> bool:
    """Returns whether a file can be parsed and is as long as its header says."""
    from lqexport.converters.gguf.header import read_header
    from lqexport.errors import UserError

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".gguf":
            read_header(path)
    except (SafetensorError, ValueError, UserError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="hit one of so many operations")
    parser.add_argument("--only", default="", help="only commands whose name holds this")
    parser.add_argument("--faults", default=",".join(FAULTS), help="only these, separated by commas")
    parser.add_argument("--first", type=int, default=1, help="the first operation to hit, from 1")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        preload(work)
    wrong, total = 0, Counter[str]()
    for name, command in commands(work, arguments.only).items():
        sweep = Sweep(command, work)
        for fault in arguments.faults.split(","):
            count = sweep.operations(FAULTS[fault])
            numbers = range(arguments.first, count + 1, arguments.every)
            statuses = Counter(sweep.hit(fault, number) for number in numbers)
            total[fault] += statuses.total()
            print(f"{name}, {fault}: {statuses.total()} of {count} operations, statuses {dict(statuses)}", flush=True)
        sweep.clock()
        print(f"{name}, two at once: statuses {sweep.at_once()}", flush=True)
        wrong += len(sweep.wrong)
    print(json.dumps({"faults": dict(total), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
