"""The command to-mmproj."""

from __future__ import annotations

from typing import Annotated

import typer

from lqexport.cli.common import output, plain_endings, print_json
from lqexport.cli.shared_options import Json, NewFile, Verbose
from lqexport.runtime.progress import terminal_listener


def to_mmproj(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id of a model with images.")],
    file: NewFile,
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
    with plain_endings():
        from lqexport import pictures
        from lqexport.models.inspect import listing, size
        from lqexport.sizes import human_bytes

        wanted = type_name.upper()
        if dry_run:
            planned = pictures.plan_mmproj(source, wanted)
        else:
            with terminal_listener() as listener:
                planned = pictures.to_mmproj(source, file, type_name=wanted, listener=listener)
        if as_json:
            print_json(planned.as_json())
            return
        output().print(listing(planned.inspection, verbose))
        if not dry_run:
            print(f"Wrote {file}, {human_bytes(size(planned.inspection.entries))}.")
