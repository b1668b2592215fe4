"""Arguments and options that several commands have, each declared once as an annotated type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lqexport.verification.default_limits import MAX_OVER_EXPECTED, MAX_PERPLEXITY_RATIO

if TYPE_CHECKING:
    from lqexport.delivery.request import Measurement

MACHINE = "Machine"
LIMITS = "Limits"
"""Panels of `--help`."""

SourceModel = Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, quantized or not, or a .gguf file.")]
AnyModel = Annotated[
    str, typer.Argument(help="A .gguf file, a folder that lqexport wrote, or a Hugging Face folder or hub id.")
]
NewFile = Annotated[Path, typer.Argument(help="The .gguf file to write.")]
NewFolder = Annotated[Path, typer.Argument(help="The folder to write, which must not exist.")]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="Largest use of a GPU's memory, such as 24GB. It does not change the result. [default: what is free]",
        rich_help_panel=MACHINE,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        help="Largest use of this machine's memory, such as 64GB. It does not change the result. [default: what is "
        "free]",
        rich_help_panel=MACHINE,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps second moments of the full prefix, for other runs over source and calibration.",
        rich_help_panel=MACHINE,
    ),
]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print types, fallbacks, size and cost, then stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")]

Against = Annotated[str, typer.Option(help="The source: a Hugging Face folder or hub id, or a .gguf file.")]
EvaluationText = Annotated[
    str, typer.Option(help="Text to evaluate on: a .txt or .jsonl file, python-heldout, wikitext2:test, ptb:test.")
]
Windows = Annotated[
    int | None,
    typer.Option(min=0, help="Windows of the text to measure on; 0: all. [default: 16; 256 sentences for encoders]"),
]
VerifyingEngine = Annotated[
    str | None,
    typer.Option(help="What runs the file: llama.cpp or lqexport. [default: llama.cpp, where it is installed]"),
]


def _none_for_zero(limit: float) -> float | None:
    return limit or None


MaxKl = Annotated[
    float | None, typer.Option(help="Fail if the mean KL divergence is above this.", rich_help_panel=LIMITS)
]
MaxPerplexityRatio = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=_none_for_zero,
        help="Fail if the perplexity grew by more than this factor; 0: no such limit.",
        rich_help_panel=LIMITS,
    ),
]
MaxOverExpected = Annotated[
    float | None,
    typer.Option(
        min=0,
        callback=_none_for_zero,
        help="Fail if the mean KL divergence is above this many times what rounding to the file's types costs; "
        "0: no such limit.",
        rich_help_panel=LIMITS,
    ),
]
MinCosine = Annotated[
    float | None,
    typer.Option(help="Encoders: fail if the mean cosine of embeddings is below this.", rich_help_panel=LIMITS),
]


@dataclass(frozen=True)
class MeasurementOptions:
    """The options of export and ladder that say how a written file is measured (see `with_recipe_options`)."""

    text: EvaluationText = "python-heldout"
    windows: Windows = None
    engine: VerifyingEngine = None
    max_kl: MaxKl = None
    max_perplexity_ratio: MaxPerplexityRatio = MAX_PERPLEXITY_RATIO
    max_over_expected: MaxOverExpected = MAX_OVER_EXPECTED

    def measurement(self, min_cosine: float | None = None) -> Measurement:
        """Returns the measurement that they ask for. The engine is checked later."""
        from lqexport.delivery.request import Measurement

        return Measurement(**vars(self), min_cosine=min_cosine)
