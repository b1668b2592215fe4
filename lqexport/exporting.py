"""`export` writes an artifact as the file or folder that runtimes load. It only moves packed bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from lqexport.converters.exl2 import writer as exl2
from lqexport.converters.exl3 import writer as exl3
from lqexport.converters.folders import compressed_tensors, gptq, native, peft
from lqexport.converters.gguf import adapter as gguf_adapter
from lqexport.converters.gguf import writer as gguf
from lqexport.converters.gguf.file import write_content
from lqexport.converters.mlx import writer as mlx
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import ANEW, UserError, files_at_hand, well_formed
from lqexport.evaluation.outline import load_outline
from lqexport.models.inspect import inspect, size
from lqexport.runtime.progress import Listener, Silent
from lqexport.sizes import split_size
from lqexport.storage.artifact import Artifact
from lqexport.target import Target

Format = Literal["gguf", "exl2", "exl3", "mlx", "gptq", "gptq_v2", "compressed-tensors", "native", "peft"]
FOLDERS: dict[str, Callable[..., None]] = {
    "exl2": exl2.write,
    "exl3": exl3.write,
    "mlx": mlx.write,
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
    """Writes a finished artifact to `path`, completely or not at all.

    format    gguf: a file for llama.cpp;  exl2: a folder for ExLlamaV2;  exl3: a folder for ExLlamaV3;  mlx: a folder
              for mlx-lm;  gptq, gptq_v2, compressed-tensors: a folder for vLLM and others (docs/gptq.md);  native: a
              folder for transformers with lqexport;  peft: a PEFT folder of the low-rank corrections alone.  None: the
              format that the artifact was quantized for
    adapter   gguf: also write the low-rank corrections to this file, as a LoRA adapter for --lora
    split_max_size   gguf: if the tensors take more than this (such as 2G), write several files, named as llama.cpp
                     names them: model-00001-of-00003.gguf and so on

    Returns `path`, or the first of several files. Raises UserError if the artifact is unfinished, damaged or was
    quantized for another format, or if llama.cpp, where it is installed, would not load the file.
    """
    stored, path, listener = Artifact(Path(artifact)), Path(path), listener or Silent()
    # Only bytes move here, so any content that does not fit together is the artifact's fault.
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
        raise UserError(f"Only GGUF files are split by a size: leave out split_max_size for the format {chosen}.")
    most = split_size(split_max_size) if split_max_size is not None else None
    listener.stage(f"Write {path.name}", size(inspect(stored.folder).entries))
    if chosen == "gguf":
        return _write_gguf(stored, path, Path(adapter) if adapter else None, most, listener)
    if chosen == "peft":
        peft.write(stored, path)
    else:
        FOLDERS[chosen](stored, path, lambda _, written: listener.advance(written))
    return path


def _made_for(artifact: Artifact) -> str:
    return Target.parse(str(artifact.run()["recipe"]["target"])).family


def _write_gguf(
    artifact: Artifact, file: Path, adapter: Path | None, split_max_size: int | None, listener: Listener
) -> Path:
    gguf_adapter.check_asked(artifact, adapter is not None)
    content = gguf.content_of_artifact(artifact)
    if (loaded := load_outline(content, encoder=architecture_of(artifact.config()).encoder)) and loaded.left_out:
        listener.message(loaded.left_out)
    first, *_ = write_content(artifact, file, content, lambda _, written: listener.advance(written), split_max_size)
    if adapter:
        gguf_adapter.write(artifact, adapter, lambda _, written: listener.advance(written))
    return first
