"""Reading the model to quantize: a Hugging Face folder, a hub id, or a .gguf file; one tensor at a time."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lqexport.artifact import read_json, write_json, written_whole
from lqexport.converters.architectures import find_architecture, normalized
from lqexport.converters.gguf_read import GGUFModel
from lqexport.converters.tensor_names import block_module
from lqexport.errors import UserError
from lqexport.weights import Weights

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


class Source(Weights, Protocol):
    """A model that can be quantized: weights, tokenizer, and what identifies it."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Changes when the model's files do; two runs of the same fingerprint read the same model."""

    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def copy_model_files(self, folder: Path) -> None:
        """Write config.json, the tokenizer and other small files into `folder`."""


class HuggingFaceSource:
    """A folder with config.json and safetensors, in one file or in shards."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.config: dict[str, Any] = normalized(_read_json(folder / "config.json"))
        self._architecture = find_architecture(self.config)
        self._files = _tensor_files(folder)
        self._stored = {self._renamed(name): name for name in self._files}

    @property
    def fingerprint(self) -> str:
        hasher = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(set(self._files.values())):
            stat = path.stat()
            with path.open("rb") as file:
                header = file.read(8 + min(int.from_bytes(file.read(8), "little"), 1 << 27))
            hasher.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode() + header)
        return hasher.hexdigest()

    def _renamed(self, name: str) -> str:
        """A stored tensor's name in the model; checkpoints of some architectures use others."""
        for pattern, new in (self._architecture.renamed if self._architecture else {}).items():
            name = re.sub(pattern, new, name)
        return name

    def _is_transposed(self, name: str) -> bool:
        if self._architecture is None:
            return False
        module = block_module(self._architecture, name)
        return module is not None and module[2] == "weight" and module[1] in self._architecture.transposed

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored_name(name)
        with _open(self._files[stored]) as file:
            shape = tuple(file.get_slice(stored).get_shape())
        return shape[::-1] if self._is_transposed(name) else shape

    def read(self, name: str) -> torch.Tensor:
        stored = self._stored_name(name)
        path = self._files[stored]
        with _open(path) as file:
            try:
                tensor = file.get_tensor(stored)
            except SafetensorError as error:
                raise UserError(f"{path} has no readable tensor {name} ({error}). Download the file again.") from error
        return tensor.T.contiguous() if self._is_transposed(name) else tensor

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:
            raise UserError(f"{self.folder} has no tensor {name}. Is the download complete?")
        return self._stored[name]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    def copy_model_files(self, folder: Path) -> None:
        for pattern in MODEL_FILES:
            for path in self.folder.glob(pattern):
                target = folder / path.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        write_json(folder / "config.json", self.config)


class GGUFSource(GGUFModel):
    """A .gguf file; packed tensors are read as the float32 values that they decode to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self.name = str(path)

    @property
    def fingerprint(self) -> str:
        hasher = hashlib.sha256()
        for path in self.paths:
            stat = path.stat()
            with path.open("rb") as file:
                hasher.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode() + file.read(1 << 20))
        return hasher.hexdigest()

    def read(self, name: str) -> torch.Tensor:  # type: ignore[override]
        return torch.from_numpy(super().read(name))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.metadata.get("tokenizer.ggml.model") == "t5":  # transformers would take it for a BPE
            raise UserError(f"The tokenizer in {self.path}, a unigram model, cannot be read from a GGUF file here.")
        return load_tokenizer(self.path.parent, gguf_file=self.path.name)

    def copy_model_files(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer().save_pretrained(folder)
        for name in self.metadata.get("tokenizer.chat_templates", []):  # of which transformers reads the default alone
            with written_whole(folder / "additional_chat_templates" / f"{Path(name).name}.jinja") as file:
                file.write(str(self.metadata.get(f"tokenizer.chat_template.{name}", "")).encode())
        write_json(folder / "config.json", self.config)


def open_source(name: str) -> Source:
    """The model that `name` means: a folder, a .gguf file, or else a hub id, which is downloaded.

    Raises UserError where there is no such model or it is incomplete.
    """
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"There is no file {path}.")
        return GGUFSource(path)
    if path.is_dir():
        return HuggingFaceSource(path, name)
    if path.exists():
        raise UserError(f"{path} is neither a model folder nor a .gguf file.")
    return HuggingFaceSource(_download(name), name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = [*MODEL_FILES, "*.safetensors", "model.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"There is no folder {name}, and it is not a hub id either.") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"There is no folder {name}, and the hub has no such model within reach: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, f"{path.parent} has no {path.name}: it is not a Hugging Face model folder.")


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file, from the index where there is one, else from model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / Path(file).name for name, file in _read_json(index).get("weight_map", {}).items()}
        for path in sorted(set(files.values())):
            with _open(path):  # a missing or cut shard is said now, not hours later
                pass
        return files
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Is the download complete?") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}). Download it again.") from error


def load_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"The tokenizer in {folder} cannot be loaded: {reason}") from error
