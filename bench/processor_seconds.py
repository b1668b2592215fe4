"""Processor seconds of `quantize` by stage, beside one bare forward pass over the same calibration tokens.

    python bench/processor_seconds.py MODEL --work FOLDER [--calibration TEXT] [--target T] [--samples N] [--effort E]

The run happens in this process. The functions of `STAGES` are wrapped by clocks, and a function that calls another one
of them does not count the other's time. Prints a table in Markdown; the last column is in units of the bare pass, which
runs the decoder blocks in float32 with torch alone, batch by batch as the run does. Processor seconds count all
threads, so they are valid on a busy machine too; the threads that write and read ahead count to whatever runs then.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lqexport
from lqexport.calibration.collect import batches
from lqexport.calibration.sequences import load_calibration
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.recipe import Recipe

STAGES = {
    "passes, both models": [
        "calibration.paused:_Run.go_on", "models.blocks:BlockModel.run", "models.blocks:BlockModel.start",
    ],
    "second moments": ["calibration.asymmetric:CrossMoments.add", "calibration.moments:SecondMoments.add"],
    "targets": ["calibration.asymmetric:CrossMoments.target"],
    "factors": ["solver.cholesky:factorize"],
    "fit": ["grids.fit:fit"],
    "feedback": ["solver.feedback:feedback"],
    "descent": ["solver.feedback:refine"],
    "losses": ["solver.linear:_sums"],
    "checks of packed bytes": ["solver.linear:_checked"],
    "reading": ["models.blocks:BlockModel._fill"],
    "writing": ["storage.artifact:Artifact.write_behind", "storage.artifact:Artifact.settle"],
    "tuning": ["tuning.tune:Tuner.run"],
}  # fmt: skip
"""Stage -> the functions whose time it is."""
USERS = ("solver.linear", "solver.corrected_linear", "calibration.asymmetric", "calibration.guided")
"""Modules that import some of these functions by name."""


class Clocks:
    """Processor seconds by stage; the time of a stage within another counts once, for the inner one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stack: list[str] = []
        self._since = time.process_time()

    def switch(self, stage: str | None) -> None:
        """Begins a stage, or ends the innermost one if `stage` is None."""
        now = time.process_time()
        self.seconds[self._stack[-1] if self._stack else "the rest"] += now - self._since
        self._since = now
        if stage is None:
            self._stack.pop()
        else:
            self._stack.append(stage)

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function with a clock around it."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.switch(stage)
            try:
                return function(*arguments, **named)
            finally:
                self.switch(None)

        return wrapped

    def install(self) -> None:
        """Puts clocks around the functions of `STAGES`, wherever they are used by name."""
        users = [importlib.import_module(f"lqexport.{name}") for name in USERS]
        for stage, functions in STAGES.items():
            for path in functions:
                module_name, _, name = path.partition(":")
                owner: Any = importlib.import_module(f"lqexport.{module_name}")
                *classes, attribute = name.split(".")
                for part in classes:
                    owner = getattr(owner, part)
                function = getattr(owner, attribute)
                timed = self.timed(stage, function)
                for user in [owner, *users]:
                    if getattr(user, attribute, None) is function:
                        setattr(user, attribute, timed)


@torch.no_grad()
def bare_pass(recipe: Recipe) -> float:
    """Returns the processor seconds of one forward pass of the source over the calibration tokens."""
    source = open_source(recipe.source)
    tokens = load_calibration(
        recipe.calibration, source.tokenizer(), samples=recipe.samples, sequence_length=recipe.sequence_length,
        seed=recipe.seed,
    ).tokens  # fmt: skip
    model = BlockModel(source)
    hidden = [model.start(ids) for ids in batches(tokens)]
    total = 0.0
    for _, block in model.blocks():
        began = time.process_time()
        hidden = [model.run(block, states) for states in hidden]
        total += time.process_time() - began
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the artifact; it is emptied")
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--target", default="gguf:Q4_K")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--effort", default="default", choices=("fast", "default", "best"))
    arguments = parser.parse_args()
    recipe = Recipe(arguments.model, arguments.target, calibration=arguments.calibration, samples=arguments.samples,
                    sequence_length=arguments.sequence_length, effort=arguments.effort)  # fmt: skip
    floor = bare_pass(recipe)
    clocks = Clocks()
    clocks.install()
    shutil.rmtree(arguments.work, ignore_errors=True)
    began = time.process_time()
    lqexport.quantize(recipe, arguments.work / "artifact")
    clocks.switch("end")
    total = time.process_time() - began
    print(
        f"{shlex.join([arguments.target, arguments.effort])}, {arguments.samples} x {arguments.sequence_length} tokens"
    )
    print("| stage | processor seconds | bare passes |\n|---|---|---|")
    rows = {"a bare pass": floor, **dict(clocks.seconds.most_common()), "all": total}
    for stage, seconds in rows.items():
        print(f"| {stage} | {seconds:.1f} | {seconds / floor:.2f} |")


if __name__ == "__main__":
    main()
