"""The command write-text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import plain_endings
from lqexport.cli.shared_options import Device, SourceModel
from lqexport.models.model_path import check_source_name
from lqexport.runtime.progress import terminal_listener


def write_text(
    source: SourceModel,
    file: Annotated[Path, typer.Argument(help="The file to write, such as text.jsonl.")],
    samples: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 64,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens in each text.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the tokens.")] = 0,
    device: Device = "auto",
) -> None:
    """Let SOURCE write text to calibrate on: half of it conversations by its chat template.

    The whole model is in memory meanwhile, in bfloat16 on a GPU, in float32 on a CPU.

    Examples:

        lqexport write-text ./model text.jsonl
        lqexport quantize ./model ./out --target gguf:Q4_K_M --calibration text.jsonl
    """
    with plain_endings():
        check_source_name(source)
        from lqexport.calibration.model_text import write_text as write

        with terminal_listener() as listener:
            write(source, file, samples=samples, sequence_length=sequence_length, seed=seed, device=device,
                  listener=listener)  # fmt: skip
        print(f"Wrote {file}.")
