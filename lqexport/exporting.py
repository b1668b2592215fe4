"""`export`: an artifact as the file or folder that others load. Only bytes move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from lqexport.converters.exl2 import writer as exl2
from lqexport.converters.folders import compressed_tensors, gptq, native, peft
from lqexport.converters.gguf import adapter as gguf_adapter
from lqexport.converters.gguf import writer as gguf
from lqexport.errors import ANEW, UserError, files_at_hand, well_formed
from lqexport.models.inspect import inspect, size
from lqexport.runtime.progress import Listener, Silent
from lqexport.sizes import split_size
from lqexport.storage.artifact import Artifact

Format = Literal["gguf", "exl2", "gptq", "gptq_v2", "compressed-tensors", "native", "peft"]
FOLDERS: dict[str, Callable[..., None]] = {
    "exl2": exl2.write,
    "gptq": gptq.write,
    "gptq_v2": functools.partial(gptq.write, v2=True),
    "compressed-tensors": compressed_tensors.write,
    "native": native.write,
}


@files_at_hand()
def export(
    artifact: str | Path,
    path: str | Path,
    *,
    format: Format | None = None,
    adapter: str | Path | None = None,
    split_max_size: str | None = None,
    listener: Listener | None = None,
) -> Path:
    """Write a finished artifact as `path`, whole or not at all, and return that, or the first of several files.

    format    gguf: a file for llama.cpp;  exl2: a folder for ExLlamaV2;  gptq, gptq_v2, compressed-tensors: a folder
              for vLLM and others (docs/gptq.md);  native: a folder for transformers with lqexport;  peft: the low-rank
              corrections alone, a PEFT folder.  None: what the artifact was quantized for
    adapter   gguf: write the low-rank corrections here, as a LoRA adapter for --lora
    split_max_size   gguf: where the tensors take more than this (such as 2G), several files as llama.cpp names them,
                     model-00001-of-00003.gguf and so on

    Raises UserError where the artifact is unfinished, damaged or was quantized for another format.
    """
    stored, path, listener = Artifact(Path(artifact)), Path(path), listener or Silent()
    # Bytes move, and nothing else is computed: what does not fit together is the artifact's.
    with well_formed(artifact, ANEW):
        return _export(stored, path, format or _made_for(stored), adapter, split_max_size, listener)


def _export(
    stored: Artifact, path: Path, chosen: str, adapter: str | Path | None, split_max_size: str | None,
    listener: Listener,
) -> Path:  # fmt: skip
    if chosen not in get_args(Format):
        raise UserError(f"Unknown format {chosen!r}. Known: {', '.join(get_args(Format))}.")
    if adapter is not None and chosen != "gguf":
        raise UserError("An adapter file is written beside a GGUF file; format 'peft' writes a PEFT folder.")
    if split_max_size is not None and chosen != "gguf":
        raise UserError("Only GGUF files are split by a size that is asked for.")
    most = split_size(split_max_size) if split_max_size is not None else None
    listener.stage(f"Write {path}", size(inspect(stored.folder).entries))
    if chosen == "gguf":
        return _write_gguf(stored, path, Path(adapter) if adapter else None, most, listener)
    if chosen == "peft":
        peft.write(stored, path)
    else:
        FOLDERS[chosen](stored, path, lambda _, written: listener.advance(written))
    return path


def _made_for(artifact: Artifact) -> str:
    return str(artifact.run()["recipe"]["target"]).partition(":")[0]


def _write_gguf(
    artifact: Artifact, file: Path, adapter: Path | None, split_max_size: int | None, listener: Listener
) -> Path:
    gguf_adapter.check_asked(artifact, adapter is not None)
    first, *_ = gguf.write(artifact, file, lambda _, written: listener.advance(written), split_max_size)
    if adapter:
        gguf_adapter.write(artifact, adapter, lambda _, written: listener.advance(written))
    return first
