"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lqexport.cli import options as option
from lqexport.errors import UserError
from lqexport.recipe import Recipe, load_recipe
from lqexport.runtime.progress import terminal_listener

if TYPE_CHECKING:
    from lqexport.exporting import Format
    from lqexport.planning.dryrun import Preview
    from lqexport.planning.memory import MemoryLimits
    from lqexport.runtime.placement import Placement
    from lqexport.runtime.progress import Listener
    from lqexport.verification.result import Verification

app = typer.Typer(
    name="lqexport",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RESUME = "Stopped. Run the same command again to go on from the last finished tensor."
NOTHING_WRITTEN = "Stopped. Nothing was written under a final name; run the same command again."


@contextlib.contextmanager
def plain_endings(stopped: str) -> Iterator[None]:
    """Turns a UserError into one line and exit status 2, and Ctrl-C into `stopped` and exit status 130."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        yield
    except UserError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        errors.print(stopped, markup=False, highlight=False)
        raise typer.Exit(130) from None


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

        lqexport quantize ./SmolLM2-135M ./out --target gguf:Q4_K_M
        lqexport to-gguf ./out model.gguf
        lqexport verify model.gguf --against ./SmolLM2-135M

    Exit status: 0 done; 1 `verify` found a limit exceeded, or `plan` no room; 2 wrong input; 130 stopped with Ctrl-C.
    """


def output() -> Console:
    """Standard output; wide where it is not a terminal, so that no table is folded in a log."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def merged_recipe(file: Path | None, options: dict[str, Any]) -> Recipe:
    """The recipe file's options, with those of the command line (where not None) in their place."""
    given = {name: value for name, value in options.items() if value not in (None, [])}
    merged = (load_recipe(file) if file else {}) | given
    if "target" not in merged:
        raise UserError("No target: give --target, such as gguf:Q4_K_M, or a --recipe file that has one.")
    return Recipe(**merged)


Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
NewFolder = Annotated[Path, typer.Argument(help="The folder to write, which must not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, quantized or not, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: new, empty, or of the same run, which then goes on.")],
    target: option.Target = None,
    method: option.Method = None,
    solver: option.Solver = None,
    calibration: option.Calibration = None,
    samples: option.Samples = None,
    sequence_length: option.SequenceLength = None,
    seed: option.Seed = None,
    moments: option.Moments = None,
    output_groups: option.OutputGroups = None,
    guided_power: option.GuidedPower = None,
    prefix: option.Prefix = None,
    compute_dtype: option.ComputeDtype = None,
    asymmetric: option.Asymmetric = None,
    smooth: option.Smooth = None,
    dampening: option.Dampening = None,
    importance: option.Importance = None,
    exponent: option.Exponent = None,
    act_order: option.ActOrder = None,
    descent: option.Descent = None,
    tune: option.Tune = None,
    tune_rate: option.TuneRate = None,
    rank: option.Rank = None,
    scaling: option.Scaling = None,
    factors: option.LowRankFactors = None,
    factor_bytes: option.FactorBytes = None,
    rounds: option.Rounds = None,
    merge: option.Merge = None,
    embedding_type: option.EmbeddingType = None,
    output_type: option.OutputType = None,
    fallback: option.Fallback = None,
    types: option.Types = None,
    size: option.Size = None,
    bits: option.Bits = None,
    head_bits: option.HeadBits = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file of these options; those given here count before it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print types, fallbacks, size and cost, then stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps second moments of the full prefix, for other runs over source and calibration."
        ),
    ] = None,
    device: Device = "auto",
    device_memory: Annotated[
        str | None, typer.Option(help="What a GPU's memory may hold, such as 24GB. [default: what is free]")
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="The same of this machine's memory. Neither changes the result.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize SOURCE into the folder OUT.

    A stopped run goes on when the same command is given again.

    Examples:

        lqexport quantize ./model ./out --target gguf:Q4_K_M --dry-run
        lqexport quantize ./model ./out --target gguf:Q3_K --calibration wikitext2
        lqexport quantize ./model ./out --target gguf:auto --size 4.25bpw --moments guided
        lqexport quantize model.gguf ./out --target native:table-3 --recipe recipe.toml
    """
    given = locals()
    options = {field.name: given[field.name] for field in dataclasses.fields(Recipe)}
    with plain_endings(RESUME):
        merged = merged_recipe(recipe, options)
        run = _Run(merged, out, device, cache, device_memory, host_memory)
        run_quantize(run, dry_run=dry_run, verbose=verbose, as_json=as_json)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A call of `quantize`, as given on the command line."""

    recipe: Recipe
    out: Path
    device: str
    cache: Path | None
    device_memory: str | None
    host_memory: str | None

    @functools.cached_property
    def limits(self) -> MemoryLimits:
        """What is given, else what is free: asked once, so that the run has what was shown."""
        from lqexport.planning.memory import MemoryLimits, available
        from lqexport.runtime.environment import choose_device
        from lqexport.sizes import memory_size

        free = available(choose_device(self.device))
        given = [memory_size(size) if size else None for size in (self.device_memory, self.host_memory)]
        return MemoryLimits(given[0] or free.device, given[1] or free.host)

    def quantize(self, listener: Listener | None = None) -> dict[str, Any]:
        from lqexport.pipeline.quantize import quantize as run

        return run(self.recipe, self.out, device=self.device, cache=self.cache, listener=listener,
                   limits=self.limits)  # fmt: skip


def run_quantize(run: _Run, *, dry_run: bool, verbose: bool, as_json: bool) -> None:
    """Show the plan; then, unless it is a dry run, check the disk and run."""
    from lqexport.planning.dryrun import as_json as preview_json
    from lqexport.planning.dryrun import preview
    from lqexport.planning.memory import choose_placement
    from lqexport.runtime.environment import choose_device

    if int(os.environ.get("RANK", 0)):  # of several processes that torchrun started, the first one talks
        if not dry_run:
            run.quantize()
        return
    recipe, out, device = run.recipe, run.out, choose_device(run.device)
    shown = preview(recipe, out)
    placement = choose_placement(shown.work, device, out, run.limits)
    if not as_json:
        _show(shown, placement, verbose, dry_run)
    if dry_run:
        if as_json:
            print(json.dumps(preview_json(shown, placement), indent=1))
        return
    shown.check_disk()
    with terminal_listener() as listener:
        report = run.quantize(listener)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    if "budget" in report:
        _show_budget(recipe, out, report["budget"])
    if "tuning" in report:
        told = report["tuning"]
        loss, name = ("kl", "KL") if "held_out_kl_after" in told else ("distance", "cosine distance")
        before, after = (told[f"held_out_{loss}_{when}"] for when in ("before", "after"))
        print(f"Tuning: {name} on held-out calibration sequences {before:.4f} before, {after:.4f} after")
    if "correction" in report:
        from lqexport.pipeline.ranks import sentences

        print("\n".join(sentences(report["correction"])))
    adapter = ["--adapter", "adapter.gguf"] if report.get("correction", {}).get("factor_bytes") else []
    family = recipe.target.partition(":")[0]
    written = ["FOLDER"] if family != "gguf" else ["model.gguf", *adapter]
    print(f"Wrote {out}. Next: {shlex.join(['lqexport', f'to-{family}', str(out), *written])}")


def _show_budget(recipe: Recipe, out: Path, limits: dict[str, Any]) -> None:
    """The types that were chosen; and the curve that the choice lies on as OUT/budget.svg, where matplotlib is."""
    from lqexport.planning.dryrun import preview, show_plan

    show_plan(preview(recipe, out), output())
    print(f"Predicted KL: {limits['predicted_kl']:.4f}, at most {limits['predicted_kl_gap']:.1e} above the best choice")
    if importlib.util.find_spec("matplotlib"):
        from lqexport.verification.report import save_budget_plot

        save_budget_plot(limits, out / "budget.svg")
        print(f"Loss against bytes: {out / 'budget.svg'}")


def _show(shown: Preview, placement: Placement, verbose: bool, estimates: bool) -> None:
    from lqexport.planning.dryrun import show_estimates, show_plan

    console = output()
    show_plan(shown, console, verbose)
    if estimates:
        show_estimates(shown, console, placement)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(help="A config.json, or a folder that holds one; no weights are needed.")],
    target: option.Target = None,
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 24GB. [default: no GPU]")] = None,
    host: Annotated[str | None, typer.Option(help="Memory of the machine, such as 64GB.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of the options of quantize.")] = None,
    as_json: Json = False,
) -> None:
    """Memory, disk, operations and hours that quantizing would take, from a config.json alone.

    Exit status 1 where it does not fit.

    Examples:

        lqexport plan ./config.json --target gguf:Q4_K_M --gpu 24GB --host 64GB
        lqexport plan ./model --target native:table-3 --json
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.planning.forecast import forecast, show

        found = forecast(model, merged_recipe(recipe, {"source": str(model), "target": target}), gpu, host)
        if as_json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            show(found, output())
    if found.too_large:
        raise typer.Exit(1)


@app.command()
def to_gguf(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote, with a target gguf:...")],
    file: Annotated[Path, typer.Argument(help="The .gguf file to write.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Write the low-rank corrections here, as a LoRA adapter for --lora.")
    ] = None,
    split_max_size: Annotated[
        str | None,
        typer.Option(help="Most bytes of tensors in a file, such as 2G: more go into FILE-00001-of-00003.gguf, ..."),
    ] = None,
) -> None:
    """Write the artifact as a GGUF file for llama.cpp.

    Only bytes move: nothing is rounded again.

    Examples:

        lqexport to-gguf ./out model.gguf
        lqexport to-gguf ./out model.gguf --adapter adapter.gguf
        lqexport to-gguf ./out model.gguf --split-max-size 2G
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.converters.gguf.split import read_split
        from lqexport.exporting import export
        from lqexport.sizes import human_bytes

        with terminal_listener() as listener:
            first = export(
                artifact, file, format="gguf", adapter=adapter, split_max_size=split_max_size, listener=listener
            )
        _, _, files = read_split(first)
        written = f"{first}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"
        beside = f", and {adapter}, {human_bytes(adapter.stat().st_size)}" if adapter else ""
        print(f"Wrote {written}, {human_bytes(sum(file.stat().st_size for file in files))}{beside}.")
        _say_verify(artifact, first, adapter)


@app.command()
def to_peft(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote with --rank.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write the artifact's low-rank corrections as a PEFT LoRA folder.

    For transformers, vLLM and ExLlamaV2, beside the quantized base.

    Examples:

        lqexport to-peft ./out ./adapter
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.converters.folders.peft import write
        from lqexport.storage.artifact import Artifact

        write(Artifact(artifact), folder)
        print(f"Wrote {folder}.")


def _say_verify(artifact: Path, written: Path, adapter: Path | str | None) -> None:
    """The command that comes after an export; of few windows, since a whole text takes hours of a large model."""
    from lqexport.storage.artifact import Artifact

    source = Artifact(artifact).run()["recipe"].get("source", "SOURCE")
    more = ["--adapter", str(adapter)] if adapter else []
    print(f"Next: {shlex.join(['lqexport', 'verify', str(written), '--against', source, *more, '--windows', '16'])}")


def _write_folder(artifact: Path, folder: Path, format: Format) -> None:
    from lqexport.converters.factors import is_factor
    from lqexport.exporting import export
    from lqexport.models.inspect import inspect, size
    from lqexport.sizes import human_bytes

    with terminal_listener() as listener:
        export(artifact, folder, format=format, listener=listener)
    written = human_bytes(size(inspect(folder).entries))
    print(f"Wrote {folder}, {written}.")
    adapter = format != "native" and any(is_factor(entry.name) for entry in inspect(artifact).entries)
    if adapter:
        print(f"It is the base of low-rank corrections: lqexport to-peft {artifact} ADAPTER writes them.")
    _say_verify(artifact, folder, "ADAPTER" if adapter else None)


@app.command()
def to_exl2(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote, with the target exl2.")],
    folder: NewFolder,
) -> None:
    """Write the artifact as a folder that ExLlamaV2 loads.

    Only bytes move: nothing is rounded again.

    Examples:

        lqexport quantize ./model ./out --target exl2 --bits 3.5
        lqexport to-exl2 ./out ./model-exl2
    """
    with plain_endings(NOTHING_WRITTEN):
        _write_folder(artifact, folder, "exl2")


@app.command()
def to_gptq(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote, with a target gptq:...")],
    folder: NewFolder,
    v2: Annotated[
        bool, typer.Option("--v2", help="checkpoint_format gptq_v2, which GPTQModel wants of asymmetric models.")
    ] = False,
) -> None:
    """Write the artifact as a folder in GPTQ's layout, for vLLM, transformers and ExLlamaV2.

    Only bytes move: nothing is rounded again.

    Examples:

        lqexport quantize ./model ./out --target gptq:4-g128-sym
        lqexport to-gptq ./out ./model-gptq
    """
    with plain_endings(NOTHING_WRITTEN):
        _write_folder(artifact, folder, "gptq_v2" if v2 else "gptq")


@app.command()
def to_compressed_tensors(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote, with a target gptq:... but -act.")],
    folder: NewFolder,
) -> None:
    """Write the artifact as a compressed-tensors folder, format pack-quantized, for vLLM and transformers.

    Only bytes move: nothing is rounded again.

    Examples:

        lqexport quantize ./model ./out --target gptq:4-g128
        lqexport to-compressed-tensors ./out ./model-ct
    """
    with plain_endings(NOTHING_WRITTEN):
        _write_folder(artifact, folder, "compressed-tensors")


@app.command()
def to_native(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote, with a target native:...")],
    folder: NewFolder,
) -> None:
    """Write the artifact as a folder that transformers loads, with `import lqexport`.

    Only bytes move: nothing is rounded again.

    Examples:

        lqexport quantize ./model ./out --target native:table-3
        lqexport to-native ./out ./model-3bit
    """
    with plain_endings(NOTHING_WRITTEN):
        _write_folder(artifact, folder, "native")


Protocols = Annotated[
    list[str], typer.Option(help="llama.cpp-512: second half of windows of 512; hf-2048: all of 2048. May repeat.")
]
EvaluationText = Annotated[
    str, typer.Option(help="Text to evaluate on: a .txt or .jsonl file, python-heldout, wikitext2:test, ptb:test.")
]
Windows = Annotated[int | None, typer.Option(help="At most so many windows. [default: the whole text]")]
MadeFrom = Annotated[
    Path | None, typer.Option(help="The folder that the file was made from: compare every tensor's digest.")
]
MaxPerplexityRatio = Annotated[
    float, typer.Option(min=0, help="Fail where the perplexity grew by more than this factor; 0: no such limit.")
]


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that quantize or a to-... command wrote.")],
    against: Annotated[str, typer.Option(help="The source: a Hugging Face folder or hub id, or a .gguf file.")],
    text: EvaluationText = "python-heldout",
    protocol: Protocols = ["llama.cpp-512"],  # noqa: B006  # typer copies it
    windows: Windows = None,
    engine: Annotated[str, typer.Option(help="What runs the file: lqexport or llama.cpp.")] = "lqexport",
    artifact: MadeFrom = None,
    adapter: Annotated[
        Path | None, typer.Option(help="The adapter with its low-rank corrections: measured with and without.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Emulate inputs of linears rounded to this type, such as native:mxint-8-g16.")
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Fail where the mean KL divergence is above this.")] = None,
    max_perplexity_ratio: MaxPerplexityRatio = 2.0,
    min_cosine: Annotated[
        float | None, typer.Option(help="Of an encoder: fail where the mean cosine of embeddings is below this.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots per layer here.")] = None,
    linear: Annotated[
        str | None, typer.Option(help="The matrix whose weights and grid the page shows. [default: the lossiest]")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Write a model card here, in Markdown.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Folder for card, page and numbers: what push-to-hub wants beside the file.")
    ] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Open the written file again and measure it against its source.

    Checks its structure and, with --artifact, every tensor; then perplexity, KL divergence and top-1 agreement, or of
    an encoder its embeddings of the text's sentences and how they rank each other.

    Examples:

        lqexport verify model.gguf --against ./model
        lqexport verify model.gguf --against ./model --engine llama.cpp --text wikitext2:test --max-kl 0.05
        lqexport verify model.gguf --against ./model --artifact ./out --html report.html
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.verification import report
        from lqexport.verification.card import save_card
        from lqexport.verification.publish import save_record
        from lqexport.verification.verifying import verify as check

        if html:
            report.check_installed()
        with terminal_listener() as listener:
            result = check(
                file,
                against,
                text=text,
                protocols=tuple(protocol),
                windows=windows,
                engine=engine,  # type: ignore[arg-type]  # checked there
                artifact=artifact,
                adapter=adapter,
                activations=activations,
                max_kl=max_kl,
                max_perplexity_ratio=max_perplexity_ratio or None,
                min_cosine=min_cosine,
                linear=linear,
                device=device,
                listener=listener,
            )
        tell_verification(result, html, as_json)
        if card:
            save_card(result, card)
        if record:
            save_record(result, record)
        if not as_json:
            _say_written(html, card, record)
    if result.failed:
        raise typer.Exit(1)


def _say_written(html: Path | None, card: Path | None, record: Path | None) -> None:
    """Where to find what `verify` wrote besides its table."""
    for path in (html, card, record):
        if path:
            print(f"Wrote {path}.")


def tell_verification(result: Verification, html: Path | None, as_json: bool) -> None:
    """Print a verification, and write its page where one is asked for."""
    from lqexport.verification.report import for_terminal, save_html

    if html:
        save_html(result, html)
    if as_json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        output().print(for_terminal(result))


@app.command()
def compare(
    files: Annotated[
        list[Path], typer.Argument(help=".gguf files, or folders that to-native, to-exl2 or quantize wrote.")
    ],
    against: Annotated[str, typer.Option(help="The source: a Hugging Face folder or hub id, or a .gguf file.")],
    text: EvaluationText = "python-heldout",
    protocol: Annotated[str, typer.Option(help="llama.cpp-512 or hf-2048, as in verify.")] = "llama.cpp-512",
    windows: Windows = None,
    engine: Annotated[str, typer.Option(help="What runs the files: lqexport or llama.cpp.")] = "lqexport",
    plot: Annotated[Path | None, typer.Option(help="Write KL divergence over bits per weight here, as SVG.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Measure several files against one source, on the same windows of the same text.

    Examples:

        lqexport compare a.gguf b.gguf ./model-3bit --against ./model --plot compared.svg
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.verification import comparison, report

        if plot:
            report.check_installed()
        with terminal_listener() as listener:
            found = comparison.compare(
                files, against, text=text, protocol=protocol, windows=windows,
                engine=engine, device=device, listener=listener,  # type: ignore[arg-type]  # checked there
            )  # fmt: skip
        if plot:
            comparison.save_plot(found, plot)
        if as_json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            output().print(comparison.table(found))


@app.command(name="eval")
def evaluate(
    file: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that to-native, to-exl2 or quantize wrote.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Perplexity on wikitext2, c4, c4-new, ptb or ptb-new, as in the papers, or a text as in verify. "
            "May repeat."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, with commas between; papers: those of the papers."),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question of a task.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many questions of a task.")] = None,
    protocol: Annotated[
        str, typer.Option(help="Of texts that are not the papers': hf-2048, llama.cpp-512.")
    ] = "hf-2048",
    windows: Windows = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Perplexity and zero-shot tasks of one file, by this program's own decoding.

    Examples:

        lqexport eval model.gguf --text wikitext2 --text c4
        lqexport eval ./model-3bit --tasks arc_easy,piqa --limit 200
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.evaluation import scores

        if not text and not tasks:
            raise UserError("Say what to evaluate: --text wikitext2, or --tasks arc_easy,piqa.")
        names = scores.task_names(tasks)
        with terminal_listener() as listener:
            found = scores.evaluate(
                file, text or [], names, include=include, shots=shots, limit=limit, protocol=protocol, windows=windows,
                device=device, listener=listener,
            )  # fmt: skip
        if as_json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            output().print(scores.table(found))


@app.command()
def judge(
    file: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that to-native, to-exl2 or quantize wrote.")],
    endpoint: Annotated[str, typer.Option(help="An OpenAI-compatible API, such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="What the endpoint calls the model that judges.")],
    against: Annotated[
        str | None, typer.Option(help="The source, to compare answers with: a folder, hub id or .gguf file.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help='A .jsonl file, a line being {"id": "a", "turns": ["..."]}. [default: our own]')
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens in an answer.")] = 256,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Have another model grade what FILE answers, and compare it with what its source answers.

    Questions and answers go to the endpoint, and nowhere else. The key is that of OPENAI_API_KEY, where one is needed.

    Examples:

        lqexport judge model.gguf --endpoint http://localhost:8000/v1 --model judge --against ./model
        lqexport judge ./model-3bit --endpoint https://api.openai.com/v1 --model NAME --questions mine.jsonl --json
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.evaluation import judging

        with terminal_listener() as listener:
            found = judging.judge(
                file, endpoint, model, against=against, questions=questions, tokens=tokens, device=device,
                listener=listener,
            )  # fmt: skip
        if as_json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            output().print(judging.table(found))


@app.command()
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

        files = publish.upload_list(file, record=record, unverified=unverified)
        for name, path in files.items():
            print(f"{human_bytes(path.stat().st_size):>9}  {name}")
        if dry_run:
            print(f"{len(files)} files; nothing was uploaded.")
            return
        address = publish.push_to_hub(file, repository, record=record, public=public, unverified=unverified)
        print(f"Uploaded: {address}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A folder of a model, a .gguf file, or a folder of ours.")],
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Tensors, types, effective bits per weight and sizes.

    Reads headers alone, so it is quick for models of any size.

    Examples:

        lqexport inspect model.gguf
        lqexport inspect ./out --json
    """
    with plain_endings(NOTHING_WRITTEN):
        from lqexport.models.inspect import inspect as look
        from lqexport.models.inspect import table

        found = look(path)
        if as_json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            console = output()
            console.print(f"{found.path}: {found.container}", markup=False, highlight=False)
            console.print(table(found.entries, verbose))


def main() -> None:
    app()
