"""Edits config.json of the tests' random models key by key, and asks what becomes of a GGUF file of each.

    python bench/config_edits.py [CASE ...]

Truth values are turned round, numbers halved, doubled, and set to 1 and 0, lists filled with their first or last value,
and each of these set to null. The weights are those that transformers would make by the edited config.json, all zero.

Prints each file that llama.cpp does not load, or loads and does not run, and at the end how many edits lqexport
refuses, how many of the others llama.cpp does not load by the file's outline, and how many it loads and does not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lqexport.converters.gguf.writer import content_of
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp, echo_log
from lqexport.planning.forecast import ConfigModel
from lqexport.planning.planned_artifact import PlannedArtifact
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.storage.files import write_json

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
from family_cases import CASES, config_and_shapes

Config = dict[str, Any]
KEPT = ("bos_token_id", "eos_token_id", "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""Keys that are not edited."""
LOADS, RUNS = b"loads\n", b"runs\n"


class ZeroModel(ConfigModel):
    """A model of zeros, as a source."""

    name = "model"

    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(self.shape(name))


def edits(config: Config) -> Iterator[Config]:
    """Yields the keys that an edit changes, with their new values."""
    for key, value in config.items():
        if key in KEPT:
            continue
        others: list[Any] = []
        if isinstance(value, bool):
            others = [not value, None]
        elif isinstance(value, int):
            others = [2 * value, value // 2, 1, 0, None]
        elif isinstance(value, list) and value:
            others = [[value[0]] * len(value), [value[-1]] * len(value), None]
        yield from ({key: other} for index, other in enumerate(others) if other not in (value, *others[:index]))


@dataclass(frozen=True)
class Planned:
    """A file of zeros that a run would write, and whether it is an encoder's."""

    path: Path
    encoder: bool


def planned_file(config: Config, folder: Path) -> Planned:
    """Writes the file that a run would write for a config.json, with a hole in place of its tensors' bytes.

    Raises UserError where lqexport refuses the model.
    """
    model, recipe = ZeroModel(config), Recipe("model", "gguf:Q4_0")
    write_json(folder / "model" / "config.json", model.config)
    artifact = PlannedArtifact(model, recipe, plan_recipe(model, recipe), folder)  # type: ignore[arg-type]
    content, path = content_of(artifact, with_tokenizer=False), folder / "model.gguf"
    path.write_bytes(content.header())
    os.truncate(path, path.stat().st_size + content.nbytes)
    return Planned(path, architecture_of(model.config).encoder)


def in_llamacpp(planned: Planned) -> tuple[str, str]:
    """Returns what llama.cpp does with a file, and its last words if it does not run it. It may end its process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 2)
        _load_and_run(planned, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    ending = "runs" if RUNS in said else "does not run" if LOADS in said else "does not load"
    return ending, f"({status}) {said.decode(errors='replace')[-300:].strip()}"


def _load_and_run(planned: Planned, writing: int) -> None:
    """Loads the outline of a file, then all of it, and runs it; ends the process, after two minutes at the latest."""
    signal.alarm(120)
    try:
        with LlamaCpp(planned.path, 32, 1, embeddings=planned.encoder, part="outline"):
            os.write(writing, LOADS)
        with LlamaCpp(planned.path, 32, 1, embeddings=planned.encoder) as engine:
            _ = engine.embedding([1, 2, 3]) if planned.encoder else engine.logits([1, 2, 3])
            os.write(writing, RUNS)
    except UserError as error:
        os.write(writing, str(error).encode())
    finally:
        os._exit(0)


def outcome(config: Config) -> tuple[str, str]:
    """Returns what becomes of a config.json, and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            planned = planned_file(config, Path(folder))
        except UserError as error:
            return "refused", str(error)
        except Exception as error:  # a fault of lqexport, which is counted
            return "unexpected", f"{type(error).__name__}: {error}"
        return in_llamacpp(planned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=list(CASES))
    arguments = parser.parse_args()
    os.environ["GGML_NO_BACKTRACE"] = "1"
    echo_log()
    counts: Counter[str] = Counter()
    for name in arguments.cases:
        config = json.loads(json.dumps(config_and_shapes(name)[0]))
        for edit in edits(config):
            what, why = outcome(config | edit)
            counts[what] += 1
            if what not in ("refused", "runs"):
                print(f"{name} {edit}: {what}. {why}", flush=True)
        print(f"{name}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
