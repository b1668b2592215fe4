"""The command inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import plain_endings, print_result
from lqexport.cli.shared_options import Json, Verbose
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
    with plain_endings():
        check_exists(path)
        from lqexport.models.inspect import inspect as look
        from lqexport.models.inspect import listing

        print_result(look(path), lambda inspection: listing(inspection, verbose), as_json=as_json)
