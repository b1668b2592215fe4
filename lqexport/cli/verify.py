"""The commands verify, compare and push-to-hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lqexport.cli.common import plain_endings, print_result
from lqexport.cli.shared_options import (
    Against,
    Device,
    EvaluationText,
    Json,
    MaxKl,
    MaxOverExpected,
    MaxPerplexityRatio,
    MinCosine,
    Windows,
)
from lqexport.errors import UserError
from lqexport.models.model_path import check_exists, check_source_name
from lqexport.runtime.progress import terminal_listener
from lqexport.storage.files import check_outputs
from lqexport.verification.default_limits import MAX_OVER_EXPECTED, MAX_PERPLEXITY_RATIO

if TYPE_CHECKING:
    from lqexport.verification.result import Verification

REPORTS, MORE = "What to write", "More to measure"
"""Panels of `verify --help`, beside that of the limits."""

MadeFrom = Annotated[
    Path | None, typer.Option(help="The folder that the file was made from: compare every tensor's digest.")
]
Html = Annotated[Path | None, typer.Option(help="Write a page with plots per layer here.", rich_help_panel=REPORTS)]
ShownLinear = Annotated[
    str | None,
    typer.Option(
        help="The matrix whose weights and grid the page shows. [default: the lossiest]", rich_help_panel=REPORTS
    ),
]
Card = Annotated[Path | None, typer.Option(help="Write a model card here, in Markdown.", rich_help_panel=REPORTS)]
Record = Annotated[
    Path | None,
    typer.Option(
        help="Folder for card, page and numbers: what push-to-hub wants beside the file.", rich_help_panel=REPORTS
    ),
]
Protocols = Annotated[
    list[str],
    typer.Option(
        help="llama.cpp-512 scores the second half of windows of 512 tokens, hf-2048 all of 2048. May repeat.",
        rich_help_panel=MORE,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="The adapter with the file's low-rank corrections: measure with it and without.", rich_help_panel=MORE
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        help="Emulate inputs of linears that are rounded to this type, such as native:mxint-8-g16.",
        rich_help_panel=MORE,
    ),
]
LongWindow = Annotated[
    bool,
    typer.Option(
        "--long",
        help="Also measure the loss by position in one window of the length that the model was trained on.",
        rich_help_panel=MORE,
    ),
]


def verify(
    file: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that quantize or a to-... command wrote.")],
    against: Against,
    text: EvaluationText = "python-heldout",
    windows: Windows = None,
    engine: Annotated[str, typer.Option(help="What runs the file: lqexport, llama.cpp or mlx.")] = "lqexport",
    artifact: MadeFrom = None,
    as_json: Json = False,
    device: Device = "auto",
    max_kl: MaxKl = None,
    max_perplexity_ratio: MaxPerplexityRatio = MAX_PERPLEXITY_RATIO,
    max_over_expected: MaxOverExpected = MAX_OVER_EXPECTED,
    min_cosine: MinCosine = None,
    html: Html = None,
    linear: ShownLinear = None,
    card: Card = None,
    record: Record = None,
    protocol: Protocols = ["llama.cpp-512"],  # noqa: B006  # typer copies it
    adapter: Adapter = None,
    activations: Activations = None,
    long: LongWindow = False,
) -> None:
    """Open the written file again and measure it against its source.

    Checks its structure and, with --artifact, every tensor. Then measures perplexity, KL divergence and top-1
    agreement; of an encoder, the embeddings of the text's sentences and how they rank each other.

    Examples:

        lqexport verify model.gguf --against ./model
        lqexport verify model.gguf --against ./model --engine llama.cpp --text wikitext2:test --max-kl 0.05
        lqexport verify model.gguf --against ./model --artifact ./out --html report.html
    """
    with plain_endings():
        check_exists(file)
        check_source_name(against)
        check_outputs(files=(html, card), folders=(record,))
        from lqexport.verification import report
        from lqexport.verification.verifying import verify as check

        if html:
            report.check_installed()
        with terminal_listener() as listener:
            result = check(
                file, against, text=text, protocols=tuple(protocol), windows=windows,
                engine=engine,  # type: ignore[arg-type]  # checked there
                artifact=artifact, adapter=adapter, activations=activations, max_kl=max_kl,
                max_perplexity_ratio=max_perplexity_ratio, max_over_expected=max_over_expected, min_cosine=min_cosine,
                linear=linear, long=long, device=device, listener=listener,
            )  # fmt: skip
        print_result(result, report.for_terminal, as_json=as_json)
        written = _write_reports(result, html, card, record)
        if not as_json:
            for path in written:
                print(f"Wrote {path}.")
    if result.failed:
        raise typer.Exit(1)


def _write_reports(result: Verification, html: Path | None, card: Path | None, record: Path | None) -> list[Path]:
    """Writes the page, the card and the record that are asked for, and returns where."""
    from lqexport.verification.card import save_card
    from lqexport.verification.publish import save_record
    from lqexport.verification.report import save_html

    if html:
        save_html(result, html)
    if card:
        save_card(result, card)
    if record:
        save_record(result, record)
    return [path for path in (html, card, record) if path]


def compare(
    files: Annotated[
        list[Path], typer.Argument(help=".gguf files, or folders that to-native, to-exl2 or quantize wrote.")
    ],
    against: Against,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="The adapter with the first file's low-rank corrections: measure that file with it, too. May repeat: "
            "for the second file, and so on."
        ),
    ] = None,
    text: EvaluationText = "python-heldout",
    protocol: Annotated[str, typer.Option(help="llama.cpp-512 or hf-2048, as in verify.")] = "llama.cpp-512",
    windows: Windows = None,
    engine: Annotated[str, typer.Option(help="What runs the files: lqexport, llama.cpp or mlx.")] = "lqexport",
    plot: Annotated[Path | None, typer.Option(help="Write KL divergence over bits per weight here, as SVG.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Measure several files against one source, on the same windows of the same text.

    Prints one table. All files and adapters are checked before anything runs.

    Examples:

        lqexport compare a.gguf b.gguf ./model-3bit --against ./model --plot compared.svg
        lqexport compare a.gguf b.gguf --against ./model --adapter a-adapter.gguf
    """
    with plain_endings():
        check_exists(*files)
        check_source_name(against)
        check_outputs(files=(plot,))
        from lqexport.verification import comparison, report

        if plot:
            if plot.suffix.lower() != ".svg":
                raise UserError(f"{plot}: the plot is an SVG file. Give a name that ends in .svg.")
            report.check_installed()
        with terminal_listener() as listener:
            result = comparison.compare(
                files, against, adapters=adapter or (), text=text, protocol=protocol, windows=windows,
                engine=engine, device=device, listener=listener,  # type: ignore[arg-type]  # checked there
            )  # fmt: skip
        print_result(result, comparison.table, as_json=as_json)
        if plot:
            comparison.save_plot(result, plot)


def push_to_hub(
    file: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that a to-... command wrote.")],
    repository: Annotated[str, typer.Argument(help="Its id on the hub, such as me/model-gguf; made if need be.")],
    record: Annotated[
        Path | None, typer.Option(help="What `verify --record` wrote for this file; uploaded with it.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="For all to see. [default: private]")] = False,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Upload without a record, or one of another or a failed file.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, then stop.")] = False,
) -> None:
    """Upload a written model to the Hugging Face hub.

    Refused where no record says that exactly these files passed their verification. The token is that of
    `hf auth login`, or HF_TOKEN.

    Examples:

        lqexport verify model.gguf --against ./model --max-kl 0.05 --record ./record
        lqexport push-to-hub model.gguf me/model-gguf --record ./record --dry-run
        lqexport push-to-hub model.gguf me/model-gguf --record ./record --public
    """
    with plain_endings("Stopped. The hub takes all files in one commit or none; run the same command again."):
        from lqexport.sizes import human_bytes
        from lqexport.verification import publish

        publish.check_repository(repository)
        files = publish.upload_list(file, record=record, unverified=unverified)
        for name, path in files.items():
            print(f"{human_bytes(path.stat().st_size):>9}  {name}")
        if dry_run:
            print(f"{len(files)} files; nothing was uploaded.")
            return
        address = publish.push_to_hub(file, repository, record=record, public=public, unverified=unverified)
        print(f"Uploaded: {address}")
