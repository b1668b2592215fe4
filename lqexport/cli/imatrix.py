"""The command imatrix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import plain_endings
from lqexport.cli.shared_options import Device, SourceModel
from lqexport.models.model_path import check_source_name
from lqexport.recipe import CALIBRATION_HELP, CALIBRATION_TEXT
from lqexport.runtime.progress import terminal_listener


def imatrix(
    source: SourceModel,
    file: Annotated[Path, typer.Argument(help="The file to write, such as imatrix.gguf.")],
    calibration: Annotated[str, typer.Option(help=CALIBRATION_HELP)] = CALIBRATION_TEXT,
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences.")] = 64,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens in each calibration sequence.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the sequences from the text.")] = 0,
    device: Device = "auto",
) -> None:
    """Write an importance matrix of SOURCE, as llama-imatrix does.

    It takes one forward pass. `quantize --imatrix` and llama.cpp's quantizer read it.

    Examples:

        lqexport imatrix ./model imatrix.gguf
        lqexport quantize ./model ./out --target gguf:Q4_K_M --imatrix imatrix.gguf
    """
    with plain_endings():
        check_source_name(source)
        from lqexport.calibration.make_imatrix import make_imatrix

        with terminal_listener() as listener:
            make_imatrix(
                source, file, calibration=calibration, samples=samples, sequence_length=sequence_length, seed=seed,
                device=device, listener=listener,
            )  # fmt: skip
        print(f"Wrote {file}.")
