"""The command inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import NOTHING_WRITTEN, Json, Verbose, output, plain_endings
from lqexport.models.model_path import check_exists


def inspect(
    path: Annotated[Path, typer.Argument(help="A folder of a model, a .gguf file, or a folder of ours.")],
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Tensors, types, effective bits per weight and sizes.

    Reads headers alone, so it is quick for models of any size.

    Examples:

        lqexport inspect model.gguf
        lqexport inspect ./out --json
    """
    with plain_endings(NOTHING_WRITTEN):
        check_exists(path)
        from lqexport.models.inspect import inspect as look
        from lqexport.models.inspect import table

        inspection = look(path)
        if as_json:
            print(json.dumps(inspection.as_json(), indent=1))
        else:
            console = output()
            console.print(f"{inspection.path}: {inspection.container}", markup=False, highlight=False)
            console.print(table(inspection.entries, verbose))
