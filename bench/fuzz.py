"""Gives every reader damaged and hostile inputs. Each must be read, or refused with one sentence (UserError).

    python bench/fuzz.py --work FOLDER [--seconds 60] [--seed 0] [--only SUBJECT]

The script makes sound files of every type from a tiny random model. Then it damages one file at a time, in its bytes or
in the structure of its JSON, and reads it to the end. Any other exception is a fault. So is a case that takes more CPU
time or memory than the sizes of these files justify. Prints a line per subject, and each fault once with the damaged
case. Exits with 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import random
import shutil
import signal
import sys
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lqexport.calibration.texts import read_text
from lqexport.converters.gguf.tokenizer import add_tokenizer
from lqexport.errors import UserError
from lqexport.exporting import export
from lqexport.models.adapters import misfits, open_factors
from lqexport.models.inspect import inspect
from lqexport.models.modules import meta_model
from lqexport.models.source import GGUFSource, open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe, load_recipe
from lqexport.runtime.progress import Callback
from lqexport.storage.artifact import manifest_bytes
from lqexport.verification.verifying import verify

Tensors = dict[str, torch.Tensor]

CPU_SECONDS = 20
"""The most CPU seconds of a case. A sound file of each subject takes less than one."""
MEMORY = 64 * 2**20
"""The most bytes that a case may hold at once in Python and NumPy. No file is larger than 2 MB."""


# Damage.

NUMBERS = (0, 1, 2, 3, 31, 32, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)
DEEP = "[" * 100_000
"""A value so deeply nested that no recursive JSON parser can read it."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, 1e308, float("inf"), float("nan"), "", "x", "F64",
    "../../../../etc/passwd", "/etc/passwd", "\ud800", "a" * 5000, [], [0], [1, 2, 3, 4, 5], ["x"], [[]], {}, {"x": 1},
    {"type": "x"}, [None], [{}],
)  # fmt: skip


def damaged(name: str, content: bytes, draw: random.Random) -> bytes:
    """Returns a file's content with damage. If its name tells its structure, the structure is often kept."""
    if name.endswith(".json") and draw.random() < 0.7:
        return damaged_json(content, draw)
    if name.endswith(".safetensors") and draw.random() < 0.6:
        return damaged_header(content, draw)
    return damaged_bytes(content, draw)


def damaged_json(content: bytes, draw: random.Random) -> bytes:
    """Returns a JSON text in which one value is replaced or deleted."""
    document = {"document": json.loads(content)}
    holder, key = draw.choice(list(locations(document)))
    choice = draw.random()
    if choice < 0.15:
        del holder[key]
    elif choice < 0.2:
        holder[key] = "DEEP"
    elif choice < 0.35 and isinstance(holder[key], int):
        holder[key] = draw.choice(NUMBERS)
    else:
        holder[key] = draw.choice(VALUES)
    changed = document.get("document", {})
    if isinstance(changed, dict) and "files" in changed:  # a manifest; a forger would renew its own digest
        return manifest_bytes(changed)
    return json.dumps(changed).replace('"DEEP"', DEEP).encode()


def locations(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key or index) of everything within a JSON value, but only of six entries of a long list or
    object."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys if len(keys) <= 40 else [*keys[:3], *keys[-3:]]:
        yield value, key
        yield from locations(value[key])


def damaged_header(content: bytes, draw: random.Random) -> bytes:
    """Returns a safetensors file with a damaged header and the length that fits it."""
    size = int.from_bytes(content[:8], "little")
    header = damaged_json(content[8 : 8 + size], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Returns content with changed bits, numbers and lengths, mostly near the beginning, where formats have headers."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        end = min(len(changed), 2000) if draw.random() < 0.6 else len(changed)
        place, damage = draw.randrange(max(1, end)), draw.randrange(7)
        if damage == 0:
            del changed[place:]
        elif damage == 1:
            del changed[place : place + draw.randrange(1, 100)]
        elif damage == 2:
            changed[place:place] = changed[place : place + draw.randrange(1, 100)]
        elif damage == 3:
            changed[place:place] = draw.randbytes(draw.randrange(1, 20))
        elif damage == 4:
            changed[place : place + 8] = draw.choice(NUMBERS).to_bytes(8, "little")
        elif damage == 5:
            changed[place : place + 4] = (draw.choice(NUMBERS) % 2**32).to_bytes(4, "little")
        elif place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


# Sound files and their readers.


@dataclass(frozen=True)
class Subject:
    """An input: a sound file or folder, the patterns of the files in it to damage, and a function that reads it."""

    path: Path
    patterns: tuple[str, ...]
    read: Callable[[Path], object]

    def files(self) -> list[Path]:
        """Returns the files that may be damaged."""
        if self.path.is_file():
            return [self.path]
        return sorted({path for pattern in self.patterns for path in self.path.glob(pattern)})


def make_model(folder: Path) -> Path:
    """Writes a Hugging Face folder with a tokenizer and a random Llama of one block, in two shards with an index."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).half().save_pretrained(folder, max_shard_size="60KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([read_text("python-docs").content[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[0])


def make_sentencepiece(path: Path) -> None:
    """Writes tokenizer.model, a BPE of 400 pieces."""
    import sentencepiece

    path.parent.mkdir(parents=True)
    sentences = io.StringIO(read_text("python-docs").content[:20_000])
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip


RECIPE = """target = "gguf:Q4_K_M"
method = "lean"
samples = 64
exponent = 1.0
act_order = true
types = ["*.down_proj.weight=Q6_K"]
"""


def make(work: Path) -> None:
    """Writes sound files of every type into a new folder."""
    model = make_model(work / "model")
    make_sentencepiece(work / "pieces" / "tokenizer.model")
    (work / "recipe.toml").write_text(RECIPE)
    (work / "text.txt").write_text(read_text("python-heldout").content[:4000], encoding="utf-8")
    few: dict[str, Any] = {"samples": 2, "sequence_length": 32, "tune": 0, "rank": 4}
    options: dict[str, dict[str, Any]] = {"exl2": {"bits": 4.5}, "exl3": {"bits": 2.5}, "gguf:Q4_0": few}
    for target in ("gguf:Q4_0", "exl2", "exl3", "gptq:4-g32", "native:table-3"):
        recipe = Recipe(str(model), target, method="rtn", **options.get(target, {}))
        quantize(recipe, work / f"artifact-{target.partition(':')[0]}")
    export(work / "artifact-gguf", work / "model.gguf", adapter=work / "adapter.gguf")
    for artifact in ("gguf", "exl2", "exl3", "gptq", "native"):
        format = "peft" if artifact == "gguf" else artifact
        export(work / f"artifact-{artifact}", work / format, format=format)  # type: ignore[arg-type]  # a variable
    export(work / "artifact-gptq", work / "compressed-tensors", format="compressed-tensors")
    make_quantized(model, work / "awq", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    make_quantized(model, work / "leanquant", leanquant, None)
    with contextlib.suppress(KeyboardInterrupt):
        quantize(sized(work), work / "stopped", listener=Callback(stop))


def sized(work: Path) -> Recipe:
    """Returns a recipe whose stopped run leaves every type of file: second moments, measured types, tuning steps."""
    few: dict[str, Any] = {"calibration": str(work / "text.txt"), "samples": 2, "sequence_length": 16, "descent": 1}
    return Recipe(str(work / "model"), "gguf:auto", size="7bpw", tune=8, **few)


def stop(stage: str, share: float) -> None:
    """Stops a run in the middle of its tuning."""
    if stage == "Tuning end to end" and share > 0.6:
        raise KeyboardInterrupt


def make_quantized(model: Path, folder: Path, parts: Callable[[int, int], Tensors], method: object) -> None:
    """Writes a checkpoint whose linears are random numbers in another tool's layout."""
    source = open_source(str(model))
    source.copy_model_files(folder)
    stored = {name: source.read(name) for name in source.names() if "proj" not in name}
    for name in [name for name in source.names() if name not in stored]:
        tensors = parts(*source.shape(name))
        stored |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": method} if method else {})))


def awq(rows: int, columns: int) -> Tensors:
    """Returns the random tensors of one linear in AWQ's layout."""
    words, groups = torch.iinfo(torch.int32), columns // 32
    qweight = torch.randint(words.min, words.max, (columns, rows // 8), dtype=torch.int32)
    qzeros = torch.randint(words.min, words.max, (groups, rows // 8), dtype=torch.int32)
    return {"qweight": qweight, "qzeros": qzeros, "scales": torch.rand(groups, rows).half() / 100}


def leanquant(rows: int, columns: int) -> Tensors:
    """Returns the random tensors of one linear in LeanQuant's layout."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    return {"quant_grid": torch.rand(rows, 16).half() / 10, "weight_codes": codes}


def subjects(work: Path) -> dict[str, Subject]:
    """Returns the subjects among the files that `make` has written."""
    weights, gguf = ("config.json", "*.safetensors"), work / "model.gguf"

    def check(path: Path) -> None:
        verify(path, str(work / "model"), text=str(work / "text.txt"), windows=1)

    def resume(path: Path) -> None:
        quantize(sized(work), path)

    def adapter(path: Path) -> None:
        base = open_export(gguf)
        factors = open_factors(gguf, path, base.config)
        assert factors is not None
        misfits(base, factors)

    return {
        "checkpoint": Subject(work / "model", (*weights, "*.index.json"), read_checkpoint),
        "tokenizer": Subject(work / "model", ("tokenizer*.json",), read_tokenizer),
        "sentencepiece": Subject(work / "pieces", ("*.model",), read_tokenizer),
        "gguf": Subject(gguf, (), read_export),
        "gguf tokenizer": Subject(gguf, (), lambda path: GGUFSource(path).tokenizer()),
        "gguf adapter": Subject(work / "adapter.gguf", (), adapter),
        "peft": Subject(work / "peft", ("*.json", "*.safetensors"), adapter),
        "exl2": Subject(work / "exl2", weights, read_export),
        "exl3": Subject(work / "exl3", weights, read_export),
        "gptq": Subject(work / "gptq", weights, read_export),
        "compressed-tensors": Subject(work / "compressed-tensors", weights, read_export),
        "gptq as a source": Subject(work / "gptq", weights, read_checkpoint),
        "compressed-tensors as a source": Subject(work / "compressed-tensors", weights, read_checkpoint),
        "awq": Subject(work / "awq", weights, read_checkpoint),
        "leanquant": Subject(work / "leanquant", weights, read_checkpoint),
        "native": Subject(work / "native", (*weights, "lqexport/*"), check),
        "artifact": Subject(work / "artifact-gguf", ("*.json", "model/config.json", "tensors/*"), check),
        "artifact to export": Subject(work / "artifact-gguf", ("*.json", "model/*.json", "tensors/*"), convert),
        "stopped run": Subject(work / "stopped", ("*.json", "tensors/*", "work/**/*.*"), resume),
        "recipe": Subject(work / "recipe.toml", (), read_recipe),
    }


def read_recipe(path: Path) -> None:
    """Reads a recipe file as the command line does."""
    Recipe(**({"source": "x", "target": "gguf:Q4_0"} | load_recipe(path)))


def read_checkpoint(folder: Path) -> None:
    """Reads everything that `quantize` reads of its source."""
    source = open_source(str(folder))
    for target in ("gguf:Q4_K_M", "gguf:Q5_0", "native:table-4"):
        plan_recipe(source, Recipe(str(folder), target))
    meta_model(source.config)
    for name in source.names():
        source.read(name)
    assert source.fingerprint
    inspect(folder)
    source.copy_model_files(folder.parent / "copied")


def read_tokenizer(folder: Path) -> None:
    """Reads a tokenizer with lqexport's code for GGUF."""
    add_tokenizer(GGUFWriter(None, "llama"), folder, 320)


def read_export(path: Path) -> None:
    """Reads every weight of an exported model."""
    inspect(path)
    model = open_export(path)
    assert model.config
    for name in model.names():
        model.shape(name)
        model.read(name)


def convert(folder: Path) -> None:
    """Exports an artifact to GGUF and an adapter."""
    export(folder, folder.parent / "converted.gguf", adapter=folder.parent / "converted-adapter.gguf", format="gguf")


# The loop.


class TooSlow(BaseException):
    """A case took more CPU time than allowed."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raises TooSlow or MemoryError if the body takes too much CPU time or memory."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    tracemalloc.start()
    try:
        yield
        if (peak := tracemalloc.get_traced_memory()[1]) > MEMORY:
            raise MemoryError(f"{peak} bytes at once")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        tracemalloc.stop()


@dataclass
class Tally:
    """The cases of one subject that were read and refused, and the faults by the line that raised them."""

    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)


def try_case(subject: Subject, draw: random.Random, scratch: Path) -> tuple[str, str]:
    """Damages one file of a subject, copied into `scratch`, and reads it.

    Returns "read", "refused" or the fault, and its details.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    copy = scratch / subject.path.name
    (shutil.copytree if subject.path.is_dir() else shutil.copyfile)(subject.path, copy)
    path = copy / (chosen := draw.choice(subject.files())).relative_to(subject.path)
    path.write_bytes(damaged(chosen.name, chosen.read_bytes(), draw))
    try:
        with limited(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            subject.read(copy)
    except UserError as error:
        sentence = str(error)
        return ("refused", sentence) if 0 < len(sentence) < 2000 else ("no sentence", sentence[:200])
    except (Exception, TooSlow) as error:
        return where(error), f"{path.relative_to(scratch)}: {traceback.format_exc(limit=-3)}"
    return "read", ""


def where(error: BaseException) -> str:
    """Returns the type of an exception and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


def fuzz(name: str, subject: Subject, seconds: float, seed: int, scratch: Path, cases: int | None = None) -> Tally:
    """Damages a subject for `seconds` seconds, or for `cases` cases. Equal seeds give equal cases."""
    tally, number, began = Tally(), 0, time.monotonic()
    while number < cases if cases is not None else time.monotonic() - began < seconds:
        case = f"{name} {seed} {number}"
        number += 1
        outcome, how = try_case(subject, random.Random(case), scratch)
        if outcome in ("read", "refused"):
            setattr(tally, outcome, getattr(tally, outcome) + 1)
        else:
            tally.faults.setdefault(outcome, f"case {case!r}, {how}")
    tally.seconds = time.monotonic() - began
    gc.collect()
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="sound files, made where there is no such folder")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the name of one subject")
    arguments = parser.parse_args()
    if not arguments.work.is_dir():
        make(arguments.work)
    total: Counter[str] = Counter()
    for name, subject in subjects(arguments.work).items():
        if arguments.only in (None, name):
            tally = fuzz(name, subject, arguments.seconds, arguments.seed, arguments.work / "scratch")
            print(f"{name}: {tally.read} read, {tally.refused} refused in {tally.seconds:.0f} s", flush=True)
            print("".join(f"FAULT {fault}\n{how}\n" for fault, how in tally.faults.items()), end="", flush=True)
            total.update(cases=tally.read + tally.refused, faults=len(tally.faults), seconds=int(tally.seconds))
    print(json.dumps(total))
    sys.exit(1 if total["faults"] else 0)


if __name__ == "__main__":
    main()
