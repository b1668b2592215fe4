"""Show that two checkouts of lqexport write the same bytes.

    python tools/compare_checkouts.py BEFORE AFTER [--work FOLDER] [--only NAME ...] [--json]

BEFORE and AFTER are folders of the repository, for example a clone of an older commit and the working tree. Small
random models are made once. Then every recipe runs with both checkouts side by side, through the command line alone,
and every byte of the artifacts and of the exported files is compared. The module layout of the checkouts may differ;
their commands and options may not. All runs are on the CPU, with one thread a process.

All recipes take about 6.4 minutes of processor time, so somewhat more than 3 minutes on two idle cores, and 100 MB of
disk. The table goes to standard output, progress to standard error. Exit status: 0 all equal; 1 something differs, or a
command failed; 2 wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDERS = ("formats", "converters", "kernels")
"""Folders at a checkout's root that install as sub-packages of lqexport."""

# run.json and its copies in exported folders and GGUF metadata hold the version of lqexport, and manifest.json holds
# the digest of run.json. Both trees are given this version in place of their own, so that a new version number changes
# no byte, and all of these files can be compared as they are.
VERSION = "0"

# log.jsonl holds times and memory. It is the only file that differs between two runs of the same recipe. The names of
# sources and output folders are the same on both sides, because commands run inside the recipe's folder and take
# relative paths.
LEFT_OUT = ("log.jsonl",)

# An editable installation of lqexport finds modules that the tree lacks, and would hide that they are missing.
SITE = """import sys

OTHERS = "__editable___lqexport"
sys.meta_path[:] = [finder for finder in sys.meta_path if OTHERS not in getattr(finder, "__module__", "")]
"""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

MODELS = "../../../models"
"""The folder of models, seen from a recipe's folder."""
LLAMA, EXPERTS, BERT, TEXT = (f"{MODELS}/{name}" for name in ("llama", "experts", "bert", "text.txt"))
HERE = "--device cpu --host-memory 4GB"
SAMPLES = "--samples 8 --sequence-length 64"
FEW = f"{HERE} --calibration {TEXT} {SAMPLES} --tune 8"
SOLVED = f"{HERE} --calibration {TEXT} {SAMPLES} --tune 0"
BUILT_IN_TEXT = f"{HERE} {SAMPLES} --tune 8"
"""Options of `quantize`: with tuning, without it, and with tuning on the built-in text, which takes longer."""


class Failure(Exception):
    """A command that failed, in one sentence."""


@dataclass(frozen=True, eq=False)
class Side:
    """One checkout at work.

    name           before or after
    folder         its own folder: tree/ (the package), runs/RECIPE/, logs/, numba/ (compiled loops)
    environment    of its processes
    commands       the process that runs its commands (tools/run_commands.py)
    """

    name: str
    folder: Path
    environment: dict[str, str]
    commands: subprocess.Popen[str]

    def log(self, recipe: str) -> Path:
        """The file that takes the output of a recipe's commands."""
        return self.folder / "logs" / f"{recipe}.txt"

    def run_folder(self, recipe: str) -> Path:
        """The folder in which a recipe's commands run."""
        return self.folder / "runs" / recipe

    def begin(self, recipe: str, command: str) -> None:
        """Start a command of lqexport in a fork."""
        call = [shlex.split(command), str(self.run_folder(recipe)), str(self.log(recipe))]
        assert self.commands.stdin is not None
        self.commands.stdin.write(json.dumps(call) + "\n")
        self.commands.stdin.flush()

    def end(self) -> int:
        """Wait for the command that `begin` started, and return its exit status."""
        assert self.commands.stdout is not None
        status = self.commands.stdout.readline()
        if not status:
            raise Failure(f"{self.name}: the process that runs the commands ended.")
        return int(status)

    def start(self, recipe: str, command: str, processes: int = 1) -> subprocess.Popen[bytes]:
        """Start a command of lqexport in a new process, or in several of torchrun's."""
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments = [*(several if processes > 1 else []), "-m", "lqexport", *shlex.split(command)]
        with self.log(recipe).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], cwd=self.run_folder(recipe), env=self.environment, stdout=log, stderr=log
            )


Run = Callable[[Sequence[Side], str, str], None]
"""Runs a command of a recipe on both sides at the same time. Raises Failure where one of them fails."""


def run_forked(sides: Sequence[Side], recipe: str, command: str) -> None:
    """Run a command in a fork on each side."""
    for side in sides:
        side.begin(recipe, command)
    _check_statuses(sides, recipe, command, [side.end() for side in sides])


def run_in_two_processes(sides: Sequence[Side], recipe: str, command: str) -> None:
    """Run a command in two processes of torchrun on each side; they talk through Gloo."""
    running = [side.start(recipe, command, processes=2) for side in sides]
    _check_statuses(sides, recipe, command, [process.wait() for process in running])


def run_stopped(sides: Sequence[Side], recipe: str, command: str) -> None:
    """Kill a command on each side when a linear of block 1 is finished, then run it again to its end."""
    running = {side: side.start(recipe, command) for side in sides}
    waiting = dict(running)
    while waiting:
        for side, process in list(waiting.items()):
            artifact = side.run_folder(recipe) / "artifact"
            if process.poll() is not None:
                raise Failure(
                    f"{side.name}: `lqexport {command}` ended before it was stopped.{_last_lines(side, recipe)}"
                )
            if next((artifact / "tensors").glob("*layers.1.*proj*.safetensors"), None):
                process.kill()
                process.wait()
                del waiting[side]
                if (artifact / "manifest.json").exists():
                    raise Failure(f"{side.name}: `lqexport {command}` was finished before it was stopped.")
        time.sleep(0.002)
    again = [side.start(recipe, command) for side in sides]
    _check_statuses(sides, recipe, command, [process.wait() for process in again])


def _check_statuses(sides: Sequence[Side], recipe: str, command: str, statuses: Sequence[int]) -> None:
    failed = [
        f"{side.name}: `lqexport {command}` ended with exit status {status}.{_last_lines(side, recipe)}"
        for side, status in zip(sides, statuses, strict=True)
        if status
    ]
    if failed:
        raise Failure("\n".join(failed))


def _last_lines(side: Side, recipe: str) -> str:
    lines = side.log(recipe).read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(f"\n    {line}" for line in lines[-6:])


@dataclass(frozen=True)
class Recipe:
    """Commands of lqexport to run and compare.

    name       for --only and the table
    commands   run one after the other in a new folder; `artifact` is what the first one writes
    first      how the first command runs; the others run in forks
    """

    name: str
    commands: tuple[str, ...]
    first: Run = run_forked


RECIPES = (
    Recipe(
        "gguf-pure",
        (
            f"quantize {LLAMA} artifact --target gguf:Q2_K {FEW}",
            "to-gguf artifact model.gguf",
            "to-gguf artifact split.gguf --split-max-size 200K",
        ),
    ),
    Recipe(
        "gguf-mix",
        (f"quantize {LLAMA} artifact --target gguf:Q4_K_M {BUILT_IN_TEXT}", "to-gguf artifact model.gguf"),
    ),
    Recipe(
        "gguf-codebook",
        (
            f"quantize {LLAMA} artifact --target gguf:IQ4_XS --type '*.down_proj.weight=Q5_K' --embedding-type Q6_K "
            f"{FEW}",
            "to-gguf artifact model.gguf",
        ),
    ),
    Recipe(
        "gguf-size",
        (f"quantize {LLAMA} artifact --target gguf:auto --size 4.5bpw {FEW}", "to-gguf artifact model.gguf"),
    ),
    Recipe(
        "guided-full",  # moments of the loss's gradient, from the full-precision prefix
        (
            f"quantize {LLAMA} artifact --target gguf:Q3_K --prefix full --moments guided --output-groups 2 {FEW}",
            "to-gguf artifact model.gguf",
        ),
    ),
    Recipe(
        "plain-gptq-method",
        (
            f"quantize {LLAMA} artifact --target gguf:Q5_0 --method gptq --moments plain --symmetric --smooth {SOLVED}",
            "to-gguf artifact model.gguf",
        ),
    ),
    Recipe(
        "rounding", (f"quantize {LLAMA} artifact --target gguf:Q6_K --method rtn {HERE}", "to-gguf artifact model.gguf")
    ),
    Recipe("exl2", (f"quantize {LLAMA} artifact --target exl2 --bits 3.5 {FEW}", "to-exl2 artifact model-exl2")),
    Recipe(
        "gptq",
        (
            f"quantize {LLAMA} artifact --target gptq:4-g128 {FEW}",
            "to-gptq artifact model-gptq",
            "to-gptq artifact model-gptq-v2 --v2",
            "to-compressed-tensors artifact model-ct",
        ),
    ),
    Recipe(
        "gptq-act-order",
        (f"quantize {LLAMA} artifact --target gptq:4-g128-act {SOLVED}", "to-gptq artifact model-gptq"),
    ),
    Recipe(
        "native-table", (f"quantize {LLAMA} artifact --target native:table-3 {FEW}", "to-native artifact model-native")
    ),
    Recipe(
        "native-affine",
        (f"quantize {LLAMA} artifact --target native:affine-4-g128 {FEW}", "to-native artifact model-native"),
    ),
    Recipe(
        "low-rank",
        (
            f"quantize {LLAMA} artifact --target gguf:Q3_K --rank 8 --rounds 2 {FEW}",
            "to-gguf artifact model.gguf --adapter adapter.gguf",
            "to-peft artifact adapter",
        ),
    ),
    Recipe(
        "low-rank-shared",  # a rank of its own for every linear, by what it gains
        (
            f"quantize {LLAMA} artifact --target native:table-2 --rank 16 --factor-bytes 30000 --scaling l2qer "
            f"--prefix full {SOLVED}",
            "to-native artifact model-native",
            "to-peft artifact adapter",
        ),
    ),
    Recipe(
        "low-rank-merged",
        (f"quantize {LLAMA} artifact --target gguf:Q4_0 --rank 8 --merge {SOLVED}", "to-gguf artifact model.gguf"),
    ),
    Recipe("experts", (f"quantize {EXPERTS} artifact --target gguf:Q4_0 {FEW}", "to-gguf artifact model.gguf")),
    Recipe(
        "encoder",
        (
            f"quantize {BERT} artifact --target native:table-3 {FEW}",
            "to-native artifact model-native",
            f"quantize {BERT} artifact-gguf --target gguf:Q4_0 {SOLVED}",
            "to-gguf artifact-gguf model.gguf",
        ),
    ),
    Recipe(
        "encoder-exact",
        (
            f"quantize {BERT} artifact --target native:table-2 --solver exact {SOLVED}",
            "to-native artifact model-native",
        ),
    ),
    Recipe(
        "moved",  # files that lqexport wrote, as sources: codes move without loss, or are solved again
        (
            f"quantize {LLAMA} artifact --target gptq:4-g128-sym --method rtn {HERE}",
            "to-gptq artifact model-gptq",
            "to-compressed-tensors artifact model-ct",
            f"quantize model-gptq moved-gptq --target gptq:4-g128-sym {SOLVED}",
            f"quantize model-ct moved-native --target native:affine-4-g128 {SOLVED}",
            f"quantize {LLAMA} artifact-gguf --target gguf:Q8_0 --method rtn {HERE}",
            "to-gguf artifact-gguf model.gguf",
            f"quantize model.gguf moved-gguf --target gguf:Q4_0 --method rtn {HERE}",
        ),
    ),
    Recipe(
        "resumed",
        (f"quantize {LLAMA} artifact --target gguf:Q4_K_M {FEW}",),
        first=run_stopped,
    ),
    Recipe(
        "two-processes",
        (
            f"quantize {LLAMA} artifact --target gguf:Q2_K {HERE} --calibration {TEXT} --samples 40 "
            "--sequence-length 64 --tune 8",  # three batches, so that both processes have some
        ),
        first=run_in_two_processes,
    ),
)


@dataclass
class Result:
    """The result of comparing one recipe.

    files, nbytes   compared, on the side of BEFORE
    differences     file -> first byte that differs, or None where the file is on one side only
    error           why a command failed, else None
    seconds         that the recipe took, both sides together
    """

    recipe: str
    files: int = 0
    nbytes: int = 0
    differences: dict[str, int | None] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether all commands ran and all bytes are the same."""
        return self.error is None and not self.differences

    def in_words(self) -> str:
        """The result as a cell of the table."""
        if self.error is not None:
            return "command failed"
        if not self.differences:
            return "equal"
        (name, place), *others = self.differences.items()
        first = f"{name} at byte {place}" if place is not None else f"{name} is on one side only"
        return f"differs: {first}{f', and {len(others)} more files' if others else ''}"

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        differences = [{"file": name, "offset": place} for name, place in self.differences.items()]
        return {
            "recipe": self.recipe, "equal": self.equal, "files": self.files, "bytes": self.nbytes,
            "differences": differences, "error": self.error, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def compare_folders(before: Path, after: Path, result: Result) -> None:
    """Compare every file of two folders, byte for byte, and record it in `result`."""
    ours, theirs = _files(before), _files(after)
    result.files, result.nbytes = len(ours), sum(path.stat().st_size for path in ours.values())
    for name in sorted(ours.keys() | theirs.keys(), key=_tensors_first):
        if name not in ours or name not in theirs:
            result.differences[name] = None
            continue
        pair = [ours[name].read_bytes(), theirs[name].read_bytes()]
        if pair[0] != pair[1]:
            result.differences[name] = _first_difference(*pair)
    if not ours:
        result.error = "The commands wrote no file."


def _first_difference(one: bytes, other: bytes) -> int:
    """The offset of the first byte that differs; the shorter length where one begins with the other."""
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in LEFT_OUT)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _tensors_first(name: str) -> tuple[bool, bool, str]:
    """Order of files in which the first difference says most: a manifest differs wherever anything does."""
    return not name.startswith("artifact"), name.endswith(".json"), name


def run_recipe(recipe: Recipe, sides: Sequence[Side]) -> Result:
    """Run all commands of a recipe on both sides, and compare what they wrote."""
    result, began = Result(recipe.name), time.monotonic()
    for side in sides:
        side.run_folder(recipe.name).mkdir(parents=True)
    try:
        for number, command in enumerate(recipe.commands):
            for side in sides:
                _set_times(side.run_folder(recipe.name))
            run = recipe.first if number == 0 else run_forked
            run(sides, recipe.name, command)
        compare_folders(*(side.run_folder(recipe.name) for side in sides), result)
    except Failure as failure:
        result.error = str(failure)
    result.seconds = time.monotonic() - began
    return result


def _set_times(folder: Path) -> None:
    """Give all files the same time of change: where one is the source of the next command, run.json holds a fingerprint
    that depends on it."""
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))


def make_tree(checkout: Path, tree: Path) -> None:
    """Copy the packages of a checkout into `tree` as they install, and give them the version `VERSION`.

    They are copied, not linked, so that a checkout can be edited meanwhile and gets no compiled files.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    # A checkout may have links to these folders in lqexport/, for type checkers.
    package_ignored = shutil.ignore_patterns("__pycache__", *FOLDERS)
    shutil.copytree(checkout / "lqexport", tree / "lqexport", ignore=package_ignored)
    for name in FOLDERS:
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, tree / "lqexport" / name, ignore=ignored)
    facts = tree / f"lqexport-{VERSION}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lqexport\nVersion: {VERSION}\n", encoding="utf-8")
    (tree / "sitecustomize.py").write_text(SITE, encoding="utf-8")


def make_environment(folder: Path) -> dict[str, str]:
    """The environment of a side's processes: its own package and compiled loops, one thread, no network."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    own = {"PYTHONPATH": str(folder / "tree"), "NUMBA_CACHE_DIR": str(folder / "numba")}
    return os.environ | dict.fromkeys(THREADS, "1") | quiet | own


def check_import(name: str, checkout: Path, folder: Path, environment: dict[str, str]) -> None:
    """Raises Failure where Python would not import lqexport from the side's tree, with the version `VERSION`."""
    asked = "import lqexport, importlib.metadata as facts; print(lqexport.__file__); print(facts.version('lqexport'))"
    found = subprocess.run(
        [sys.executable, "-c", asked], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise Failure(f"{name}: {checkout} cannot be imported.\n{found.stderr.strip()}")
    wanted = [str(folder / "tree" / "lqexport" / "__init__.py"), VERSION]
    if found.stdout.split("\n")[:2] != wanted:
        raise Failure(f"{name}: Python imports lqexport from {found.stdout.split()}, not from {wanted}.")


@contextlib.contextmanager
def open_side(name: str, checkout: Path, work: Path) -> Iterator[Side]:
    """A side that is ready to run commands. Raises Failure where its checkout cannot be imported."""
    folder = work / name
    (folder / "logs").mkdir(parents=True)
    make_tree(checkout, folder / "tree")
    environment = make_environment(folder)
    check_import(name, checkout, folder, environment)
    script = Path(__file__).resolve().with_name("run_commands.py")
    with (
        (folder / "logs" / "commands.txt").open("wb") as log,
        subprocess.Popen(
            [sys.executable, str(script)], cwd=folder, env=environment, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        ) as commands,
    ):  # fmt: skip
        yield Side(name, folder, environment, commands)


def make_models(folder: Path) -> None:
    """Write the random models of all recipes, a Llama, a DeepSeek-V2 with experts and a BERT, and the text to calibrate
    on."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from transformers import (
        BertConfig,
        BertModel,
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    common = {"vocab_size": 512, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
    # Superblocks need columns divisible by 256, and groups of EXL2 and GPTQ by 128.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaConfig(**common, **sizes, num_key_value_heads=2, tie_word_embeddings=True)
    latent = {"kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    heads = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    mixture = {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    widths = {"intermediate_size": 96, "moe_intermediate_size": 32}
    experts = DeepseekV2Config(**common, **latent, **heads, **mixture, **widths)
    text = training_text()
    folder.mkdir()
    (folder / "text.txt").write_text(text, encoding="utf-8")
    pieces = byte_pairs(text)
    save_random(folder / "llama", LlamaForCausalLM(llama).half(), pieces)
    save_random(folder / "experts", DeepseekV2ForCausalLM(experts), pieces)
    words = word_pieces(text)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertConfig(vocab_size=len(words), max_position_embeddings=128, **sizes)
    save_random(folder / "bert", BertModel(bert), words)
    (folder / "bert" / "1_Pooling").mkdir()
    (folder / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")


def save_random(folder: Path, model: Any, tokenizer: Any) -> None:
    """Draw a model's weights, with seed 0, and save it with its tokenizer.

    Matrices have outputs as large as their inputs, so that logits spread and tuning has something to gain. Norms and
    biases are random too, so that exchanging two of them changes bytes.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = 0.2 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        middle = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.data.copy_(middle + spread * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def training_text() -> str:
    """Part of Python's language reference, which every installation carries."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:100_000]


def byte_pairs(text: str) -> Any:
    """A byte-level BPE tokenizer of 512 tokens that splits text as SmolLM2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    digits, split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[end], initial_alphabet=split.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def word_pieces(text: str) -> Any:
    """A WordPiece tokenizer as BERT has it, of at most 512 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=512, special_tokens=[*special.values()], show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    around = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def compare(before: Path, after: Path, work: Path, recipes: Sequence[Recipe]) -> list[Result]:
    """Run all recipes with both checkouts inside `work`. Raises Failure where a checkout cannot be imported."""
    with open_side("before", before, work) as first, open_side("after", after, work) as second:
        tell("Making the models")
        make_models(work / "models")
        results = []
        for number, recipe in enumerate(recipes, 1):
            tell(f"[{number}/{len(recipes)}] {recipe.name}")
            results.append(result := run_recipe(recipe, (first, second)))
            tell(f"    {result.in_words()}, {result.seconds:.1f} s")
            if result.error:
                tell(result.error)
        return results


def tell(line: str) -> None:
    """Write a line of progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def show(results: Sequence[Result]) -> None:
    """Print the results as a table."""
    table = Table()
    for column, side in (("recipe", "left"), ("files", "right"), ("bytes", "right"), ("result", "left")):
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for result in results:
        style = None if result.equal else "red"
        table.add_row(result.recipe, str(result.files), f"{result.nbytes:,}", result.in_words(), style=style)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    different = sum(not result.equal for result in results)
    total = sum(result.nbytes for result in results)
    verdict = (
        f"{different} of {len(results)} recipes differ or failed." if different else f"All {total:,} bytes are equal."
    )
    console.print(verdict, highlight=False)


@contextlib.contextmanager
def work_folder(wanted: Path | None) -> Iterator[Path]:
    """The folder to work in: the wanted one, or a temporary one, which is deleted afterwards."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="compare-checkouts-") as folder:
        yield Path(folder).resolve()


def parse() -> argparse.Namespace:
    """The arguments of the command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", type=Path, help="a checkout")
    parser.add_argument("after", metavar="AFTER", type=Path, help="the checkout to compare with it")
    parser.add_argument(
        "--work", metavar="FOLDER", type=Path,
        help="new or empty folder that keeps models, artifacts, files and logs [default: a temporary one, deleted]",
    )  # fmt: skip
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument(
        "--only", metavar="NAME", nargs="+", choices=names, help=f"run these recipes alone: {', '.join(names)}"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    for checkout in (arguments.before, arguments.after):
        if not (checkout / "lqexport" / "__init__.py").is_file():
            parser.error(f"{checkout} is no checkout of lqexport: it has no lqexport/__init__.py.")
    if arguments.work and arguments.work.exists() and any(arguments.work.iterdir()):
        parser.error(f"{arguments.work} is not empty. Choose another folder for --work, or delete this one.")
    return arguments


def main() -> None:
    arguments = parse()
    recipes = [recipe for recipe in RECIPES if not arguments.only or recipe.name in arguments.only]
    try:
        with work_folder(arguments.work) as work:
            results = compare(arguments.before, arguments.after, work, recipes)
    except Failure as failure:
        sys.exit(f"error: {failure}")
    if arguments.json:
        print(json.dumps([result.as_json() for result in results], indent=1))
    else:
        show(results)
    sys.exit(0 if all(result.equal for result in results) else 1)


if __name__ == "__main__":
    main()
