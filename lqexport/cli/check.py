"""The command check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lqexport.cli.common import plain_endings, print_result
from lqexport.cli.shared_options import Json
from lqexport.models.model_path import check_exists, check_source_name
from lqexport.runtime.progress import terminal_listener


def check(
    files: Annotated[list[Path], typer.Argument(help=".gguf files from anywhere, or folders of them.")],
    against: Annotated[
        str | None, typer.Option(help="The source: also do what verify does, on 16 windows of its default text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what is wrong with GGUF files, whoever wrote them.

    Checks structure, numbers, names and shapes of tensors, settings, vocabulary and chat template, and loads each file
    in llama.cpp where that is installed. Exit status 1 if any file has an error; warnings do not count.

    Examples:

        lqexport check model.gguf
        lqexport check ./downloads --json
        lqexport check model.gguf --against ./model
    """
    with plain_endings():
        check_exists(*files)
        if against is not None:
            check_source_name(against)
        from lqexport.verification import checks

        with terminal_listener() as listener:
            result = checks.check(files, against, listener=listener)
        print_result(result, checks.table, as_json=as_json)
    if result.failed:
        raise typer.Exit(1)
