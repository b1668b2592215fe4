"""The commands that write an artifact as a file or folder: to-gguf, to-mlx, to-gptq and others. Only bytes move."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lqexport.cli.common import plain_endings
from lqexport.cli.shared_options import NewFile, NewFolder
from lqexport.models.model_path import check_exists
from lqexport.runtime.progress import terminal_listener

if TYPE_CHECKING:
    from lqexport.exporting import Format


def to_gguf(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote, with a target gguf:...")],
    file: NewFile,
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
    with plain_endings():
        check_exists(artifact)
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


def to_peft(
    artifact: Annotated[Path, typer.Argument(help="A folder that quantize wrote with --rank.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Write the artifact's low-rank corrections as a PEFT LoRA folder.

    For transformers, vLLM and ExLlamaV2, beside the quantized base.

    Examples:

        lqexport to-peft ./out ./adapter
    """
    with plain_endings():
        check_exists(artifact)
        from lqexport.exporting import export

        with terminal_listener() as listener:
            export(artifact, folder, format="peft", listener=listener)
        print(f"Wrote {folder}.")


def _say_verify(artifact: Path, written: Path, adapter: Path | str | None) -> None:
    """Prints the command that comes after an export."""
    from lqexport.storage.artifact import Artifact

    source = Artifact(artifact).run()["recipe"].get("source", "SOURCE")
    more = ["--adapter", str(adapter)] if adapter else []
    print(f"Next: {shlex.join(['lqexport', 'verify', str(written), '--against', source, *more])}")


def _write_folder(artifact: Path, folder: Path, format: Format) -> None:
    """Exports to a folder, and prints what comes next."""
    with plain_endings():
        check_exists(artifact)
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
    _write_folder(artifact, folder, "gptq_v2" if v2 else "gptq")


def _to_folder(format: Format, target: str, written: str, examples: str) -> Callable[[Path, Path], None]:
    """Returns the command that writes an artifact as a folder, for a format without options.

    target     the target of such artifacts, in words
    written    what the folder is, in words
    examples   the last lines of the help
    """

    def command(artifact: Path, folder: NewFolder) -> None:
        _write_folder(artifact, folder, format)

    argument = typer.Argument(help=f"A folder that quantize wrote, with {target}")
    command.__annotations__["artifact"] = Annotated[Path, argument]
    command.__name__ = f"to_{format.replace('-', '_')}"
    command.__doc__ = f"""Write the artifact as {written}.

    Only bytes move: nothing is rounded again.

    Examples:
    {examples}"""
    return command


to_exl2 = _to_folder(
    "exl2",
    "the target exl2.",
    "a folder that ExLlamaV2 loads",
    """
        lqexport quantize ./model ./out --target exl2 --bits 3.5
        lqexport to-exl2 ./out ./model-exl2
    """,
)
to_exl3 = _to_folder(
    "exl3",
    "a target exl3 or exl3:...",
    "a folder that ExLlamaV3 loads, for TabbyAPI and text-generation-webui",
    """
        lqexport quantize ./model ./out --target exl3 --bits 3.25
        lqexport to-exl3 ./out ./model-exl3
    """,
)
to_mlx = _to_folder(
    "mlx",
    "a target mlx:...",
    "a folder that mlx-lm and LM Studio load, for Apple's machines",
    """
        lqexport quantize ./model ./out --target mlx:4-g64
        lqexport to-mlx ./out ./model-4bit
    """,
)
to_compressed_tensors = _to_folder(
    "compressed-tensors",
    "a target gptq:... but -act.",
    "a compressed-tensors folder, format pack-quantized, for vLLM and transformers",
    """
        lqexport quantize ./model ./out --target gptq:4-g128
        lqexport to-compressed-tensors ./out ./model-ct
    """,
)
to_native = _to_folder(
    "native",
    "a target native:...",
    "a folder that transformers loads, with `import lqexport`",
    """
        lqexport quantize ./model ./out --target native:table-3
        lqexport to-native ./out ./model-3bit
    """,
)
