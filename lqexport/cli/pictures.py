"""The command to-mmproj."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import NOTHING_WRITTEN, Json, Verbose, output, plain_endings
from lqexport.runtime.progress import terminal_listener


def to_mmproj(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id of a model with images.")],
    file: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    type_name: Annotated[str, typer.Option("--type", help="Type of the matrices: F16, BF16, F32 or Q8_0.")] = "F16",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the tensors and the size; write nothing.")] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write the part of a model that reads images as a file for llama.cpp's `--mmproj`.

    The text part is a file of its own, which `export` writes. docs/pictures.md has the families.

    Examples:

        lqexport to-mmproj ./gemma-3-4b-it mmproj.gguf
        lqexport to-mmproj ./gemma-3-4b-it mmproj.gguf --type Q8_0 --dry-run
        llama-server -m gemma-3-4b-it-Q4_K_M.gguf --mmproj mmproj.gguf
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport import pictures
        from lqexport.models.inspect import size, table
        from lqexport.sizes import human_bytes

        wanted = type_name.upper()
        if dry_run:
            planned = pictures.plan_mmproj(source, wanted)
        else:
            with terminal_listener() as listener:
                planned = pictures.to_mmproj(source, file, type_name=wanted, listener=listener)
        if as_json:
            print(json.dumps(planned.as_json(), indent=1))
            return
        inspection = planned.inspection
        console = output()
        console.print(f"{inspection.path}: {inspection.container}", markup=False, highlight=False)
        console.print(table(inspection.entries, verbose))
        if not dry_run:
            print(f"Wrote {file}, {human_bytes(size(inspection.entries))}.")
