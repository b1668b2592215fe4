"""The command line: all commands, and what `lqexport --help` says of them.

Commands import what they need when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from lqexport.cli.check import check
from lqexport.cli.evaluate import evaluate, judge
from lqexport.cli.export import export
from lqexport.cli.imatrix import imatrix
from lqexport.cli.inspect import inspect
from lqexport.cli.ladder import ladder
from lqexport.cli.options import ShortHelp
from lqexport.cli.pictures import to_mmproj
from lqexport.cli.quantize import plan, quantize
from lqexport.cli.to_formats import (
    to_compressed_tensors,
    to_exl2,
    to_exl3,
    to_gguf,
    to_gptq,
    to_mlx,
    to_native,
    to_peft,
)
from lqexport.cli.unexpected import STATUS, unexpected
from lqexport.cli.verify import compare, push_to_hub, verify
from lqexport.cli.write_text import write_text

app = typer.Typer(
    name="lqexport",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lqexport {version('lqexport')}")
        raise typer.Exit


@app.callback()
def about(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Quantize a Hugging Face language model inside the exact grid of its target file, write the file, and measure from
    the file what was lost.

    A whole run:

        lqexport export ./SmolLM2-135M SmolLM2-135M-Q4_K_M.gguf

    The same in steps:

        lqexport quantize ./SmolLM2-135M ./out --target gguf:Q4_K_M
        lqexport to-gguf ./out model.gguf
        lqexport verify model.gguf --against ./SmolLM2-135M

    Exit status: 0 done; 1 a limit of `export`, `ladder` or `verify` exceeded, an error found by `check`, or `plan` does
    not fit; 2 wrong input; 3 an error that nobody expected, whose traceback is in a log file (LQEXPORT_TRACEBACK=1
    prints it); 130 stopped with Ctrl-C, 143 by SIGTERM.
    """


for command in (export, ladder, quantize):
    app.command(cls=ShortHelp)(command)
for command in (
    plan,
    to_gguf,
    to_peft,
    to_exl2,
    to_exl3,
    to_mlx,
    to_gptq,
    to_compressed_tensors,
    to_native,
    to_mmproj,
    check,
    verify,
    compare,
):
    app.command()(command)
app.command(name="eval")(evaluate)
for command in (judge, push_to_hub, inspect, imatrix, write_text):
    app.command()(command)


def main() -> None:
    """Runs the command line.

    What commands do outside of `plain_endings` ends with the same sentence and status as within. Letters that the
    output's encoding lacks are shown as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except Exception as error:
        print(unexpected(error), file=sys.stderr)
        sys.exit(STATUS)
