"""Coverage-guided fuzzing of the readers, by atheris (`pip install -e '.[fuzz]'`).

    python bench/coverage_fuzz.py --work FOLDER [--seconds 60] [--only TARGET]

A file of each target is damaged, half of the time as bench/fuzz.py does it, else as libFuzzer does, and is read; a
UserError is all that may be raised. What reaches a line or branch that nothing reached before is kept, and damaged
further; a later call with the same folder goes on from it. Each target has a process of its own, which ends at its
first fault and leaves the file in the folder. Prints a line per target: branches reached by the sound file, then by all
that was kept, and the cases. Exits with 1 where there was a fault.
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

# Numba compiles the kernels, and cannot do so with the counting of branches in them.
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
"""Bytes of a damaged file; no sound one is larger."""
LIMITS = ("-timeout=20", "-rss_limit_mb=3000")
"""Of one case: seconds, and memory of the process, of which torch and numba take most."""


@dataclass(frozen=True)
class Target:
    """A file of a folder or by itself, which is damaged, and what reads it."""

    sound: Path
    file: str
    read: Callable[[Path], object]


def read_tensors(folder: Path) -> None:
    """A checkpoint's index and headers, and all that they say is there."""
    source = open_source(str(folder))
    for name in source.names():
        source.read(name)


def read_weights(folder: Path) -> None:
    """A written model, to the last weight."""
    model = open_export(folder)
    for name in model.names():
        model.read(name)


def targets(work: Path) -> dict[str, Target]:
    """What `fuzz.make` has made."""
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
    """Damage one target for so long; libFuzzer ends this process. Its messages go into a file."""
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
        except (ValueError, RecursionError):  # no JSON any more
            damaged = b""
        return damaged if 0 < len(damaged) <= most else bytes(atheris.Mutate(content, most))

    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-artifact_prefix={place}/", *LIMITS]
    atheris.Setup([sys.argv[0], str(corpus), *options], read, custom_mutator=mutate)
    atheris.Fuzz()


def apart(work: Callable[..., None], *arguments: object) -> int:
    """The exit status of a process of its own that does this; it need not import anything again."""
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
        apart(fuzz.make, arguments.work)
    faults = 0
    for name, target in targets(arguments.work).items():
        if arguments.only in (None, name):
            place = arguments.work / "coverage" / name.replace(" ", "-")
            status = apart(search, target, place, arguments.seconds)
            messages = (place / "log").read_text(encoding="utf-8", errors="replace")
            print(f"{name}:", *re.findall(r"(?:INITED|DONE) +cov: \d+|Done .*", messages), sep="  ", flush=True)
            print(f"FAULT {name}\n{messages[-2500:]}" if status else "", end="", flush=True)
            faults += status != 0
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
