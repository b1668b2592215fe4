"""Coverage-guided fuzzing of the readers with atheris (`pip install -e '.[fuzz]'`).

    python bench/coverage_fuzz.py --work FOLDER [--seconds 60] [--only TARGET]

The script damages one file of each target and reads it. Half of the time bench/fuzz.py chooses the damage, otherwise
libFuzzer. A reader may only raise UserError. A damaged file that reaches a new line or branch is kept and damaged
further, and a later call with the same folder continues from it. Each target has its own process, which ends at its
first fault and leaves the file in the folder. Prints a line per target: the branches that the sound file reaches, those
that all kept files reach, and the number of cases. Exits with 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import atheris

# numba cannot compile the kernels if atheris has added its branch counters to them.
KERNELS = [f"lqexport.kernels.{path.stem}" for path in Path(__file__).parents[1].glob("kernels/*.py")]

with atheris.instrument_imports(include=["lqexport"], exclude=KERNELS):
    import fuzz

    from lqexport.converters.gguf.header import read_header
    from lqexport.converters.gguf.sentencepiece_model import read_sentencepiece
    from lqexport.errors import UserError
    from lqexport.models.source import open_source
    from lqexport.models.written import open_export
    from lqexport.storage.artifact import Artifact

LONGEST = 2**18
"""The most bytes of a damaged file. No sound file is larger."""
LIMITS = ("-timeout=20", "-rss_limit_mb=3000")
"""The limits of one case: seconds, and the memory of the process, most of which torch and numba take."""


@dataclass(frozen=True)
class Target:
    """A file to damage, and its reader.

    sound   the undamaged file, or the folder that holds it
    file    the file's name in the folder; empty if `sound` is the file
    read    reads the file or the folder
    """

    sound: Path
    file: str
    read: Callable[[Path], object]


def read_tensors(folder: Path) -> None:
    """Reads a checkpoint's index, its headers, and every tensor that they list."""
    source = open_source(str(folder))
    for name in source.names():
        source.read(name)


def read_weights(folder: Path) -> None:
    """Reads every weight of an exported model."""
    model = open_export(folder)
    for name in model.names():
        model.read(name)


def targets(work: Path) -> dict[str, Target]:
    """Returns the targets among the files that `fuzz.make` has written."""
    shard = min(path.name for path in (work / "model").glob("*.safetensors"))
    return {
        "gguf": Target(work / "model.gguf", "", read_header),
        "config": Target(work / "model", "config.json", fuzz.read_checkpoint),
        "index": Target(work / "model", "model.safetensors.index.json", read_tensors),
        "shard": Target(work / "model", shard, read_tensors),
        "sentencepiece": Target(work / "pieces" / "tokenizer.model", "", read_sentencepiece),
        "recipe": Target(work / "recipe.toml", "", fuzz.read_recipe),
        "manifest": Target(work / "artifact-native", "manifest.json", lambda path: Artifact(path).manifest()),
        "native": Target(work / "native", "config.json", read_weights),
        "exl2": Target(work / "exl2", "config.json", read_weights),
        "gptq": Target(work / "gptq", "config.json", read_weights),
        "compressed-tensors": Target(work / "compressed-tensors", "config.json", read_weights),
        "gptq as a source": Target(work / "gptq", "config.json", read_tensors),
    }


def search(target: Target, place: Path, seconds: int) -> None:
    """Damages one target for `seconds` seconds. libFuzzer then ends this process. Its messages go into a file."""
    scratch, corpus, log = place / "scratch", place / "corpus", place / "log"
    shutil.rmtree(scratch, ignore_errors=True)
    corpus.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if target.sound.is_dir() else shutil.copyfile)(target.sound, scratch)
    file, sound = scratch / target.file, target.sound / target.file
    shutil.copyfile(sound, corpus / "sound")
    warnings.simplefilter("ignore")
    messages = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(messages, stream.fileno())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            target.read(scratch)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        try:
            damaged = fuzz.damaged(sound.name, content, random.Random(seed)) if seed % 2 else b""
        except (ValueError, RecursionError):  # the content is not JSON any more
            damaged = b""
        return damaged if 0 < len(damaged) <= most else bytes(atheris.Mutate(content, most))

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-artifact_prefix={place}/", *LIMITS]
    atheris.Setup([sys.argv[0], str(corpus), *options], read, custom_mutator=mutate)
    atheris.Fuzz()


def run_forked(work: Callable[..., None], *arguments: object) -> int:
    """Runs `work` in a forked process, which has all imports already. Returns its exit status."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="sound files, made where there is no such folder")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--only", help="the name of one target")
    arguments = parser.parse_args()
    if not arguments.work.is_dir():
        run_forked(fuzz.make, arguments.work)
    faults = 0
    for name, target in targets(arguments.work).items():
        if arguments.only in (None, name):
            place = arguments.work / "coverage" / name.replace(" ", "-")
            status = run_forked(search, target, place, arguments.seconds)
            messages = (place / "log").read_text(encoding="utf-8", errors="replace")
            print(f"{name}:", *re.findall(r"(?:INITED|DONE) +cov: \d+|Done .*", messages), sep="  ", flush=True)
            print(f"FAULT {name}\n{messages[-2500:]}" if status else "", end="", flush=True)
            faults += status != 0
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
