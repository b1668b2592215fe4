"""Reads the model to quantize, one tensor at a time: a Hugging Face folder, a hub id, or a .gguf file."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import shlex
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lqexport.converters.checkpoints.detect import layout_of
from lqexport.converters.checkpoints.layout import CheckpointLayout
from lqexport.converters.gguf.kept import keep
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.split import is_gguf
from lqexport.converters.models.architecture import CUT, Architecture, Factor, Order
from lqexport.converters.models.architectures import find_architecture, folded_factors, normalized
from lqexport.converters.models.stored_names import has_other_parts, renamed, renaming
from lqexport.converters.models.tensor_names import as_matrix, block_module, is_tied
from lqexport.converters.models.text_parts import OTHER_PARTS, is_whole
from lqexport.errors import UserError, listed, well_formed
from lqexport.models.fused_parts import groups_of, part, part_shape, parts_of
from lqexport.models.interface import Weights
from lqexport.models.model_path import NOT_WITHIN_REACH, check_source_name
from lqexport.models.sentence_files import MODULES, POOLING, PROJECTION, pooling_type, projection_files
from lqexport.models.stacked import ExpertRows, experts_within
from lqexport.models.tokenizer_files import VOCABULARIES, load_tokenizer, write_tokenizer
from lqexport.runtime.hub import hub
from lqexport.storage.background import FileSpan
from lqexport.storage.config_check import read_config
from lqexport.storage.files import copy_files, read_json, write_json
from lqexport.storage.tensor_files import forms, open_tensors, small_tensor, spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    "additional_chat_templates/[!.]*.jinja",
    # The vocabulary of WordPiece, and the files that sentence-transformers reads beside the model.
    "vocab.txt",
    MODULES,
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    POOLING,
)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that say how images are made ready; the second counts before the first."""
OTHER_FILES = ("README.md", "adapter_config.json", "model_index.json", *PROCESSOR_FILES)
"""Files that are read where a source has them, and not copied: they say its license, that it is no model, or how images
are made ready."""
QUANTIZATION_FILES = ("quantize_config.json", "hf_quant_config.json")
"""Files of settings that tools write beside config.json: AutoGPTQ and ModelOpt."""
DTYPE_BYTES = {"I16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "F64": 8}
"""Bytes per value of each dtype by safetensors' name. Dtypes that are not listed have one byte."""


class Source(Weights, Protocol):
    """A model that can be quantized: weights, tokenizer, and a fingerprint that identifies it."""

    name: str

    @property
    def fingerprint(self) -> str:
        """A hash (hex) that changes when the model's files change: equal fingerprints mean the same model."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the model's tokenizer. Raises UserError if there is none or it cannot be read."""

    def copy_model_files(self, folder: Path) -> None:
        """Writes config.json, the tokenizer and other small files into `folder`."""


class HuggingFaceSource:
    """A folder with config.json and safetensors, in one file or in shards.

    Matrices that another tool has quantized are decoded to float32 when they are read.

    layout   how the matrices are quantized; None if they are not
    cut      whether `kv_b_proj` of a `cuttable` architecture is read as two linears

    Raises UserError if a file is missing or damaged, or if the method of quantization is unknown.
    """

    def __init__(self, folder: Path, name: str, cut: bool = False) -> None:
        self.folder = folder
        self.name = name
        _check_is_model(folder)
        whole = read_config(folder / "config.json", _missing(folder / "config.json"))
        self.config: dict[str, Any] = normalized(whole) | ({CUT: True} if cut else {})
        self._architecture = find_architecture(self.config)
        self._files = _tensor_files(folder)
        self._projections: dict[str, Path] = {}
        if self._architecture and self._architecture.encoder:
            self.config.setdefault("pooling_type", pooling_type(folder))
            self._projections = projection_files(folder, self._architecture)
            self._files |= self._projections
        self._has_other_parts = is_whole(whole) or has_other_parts(self._files)
        self._patterns = renaming(
            self._architecture, self._files, whole=self._has_other_parts, layers=self.config.get("num_hidden_layers")
        )
        self._experts: dict[str, ExpertRows] = {}
        self.config |= self._projection_sizes()
        self._experts = self._unstacked()
        stacks = {rows.stored for rows in self._experts.values()}
        names = [*(name for name in self._files if name not in stacks), *self._experts]
        with well_formed(f"quantization_config of {folder}"):
            self.layout: CheckpointLayout | None = layout_of(folder, self.config, names, self)
        # What is written from this source is not quantized so.
        in_config = [self.config.pop(key, None) for key in ("quantization_config", "quantization")]
        beside = [] if any(in_config) else [folder / name for name in QUANTIZATION_FILES]
        self._settings = [path for path in beside if self.layout and path.is_file()]
        tensors = {name: self.layout.tensor_of(name) if self.layout else name for name in names}
        kept = [tensor for tensor in tensors.values() if not (self._has_other_parts and re.search(OTHER_PARTS, tensor))]
        self._stored = {self._renamed(tensor): tensor for tensor in kept}
        self._fused: dict[str, Order] = {}
        self._fused = self._taken_apart() | self._extended()
        self._factors = folded_factors(whole)
        if self._architecture and self._has_own_output(self._architecture):
            self.config["tie_word_embeddings"] = False
            self._stored.setdefault(self._architecture.output, self._stored[self._architecture.embedding])

    def _projection_sizes(self) -> dict[str, int]:
        """Returns the numbers of rows and columns of an encoder's projections, by their keys of config.json."""
        sizes: dict[str, int] = {}
        for name in self._projections:
            assert self._architecture is not None
            with well_formed(str(self._projections[name])):
                sizes |= dict(zip(self._architecture.projections[name], self.stored_shape(name), strict=True))
        return sizes

    def _has_own_output(self, architecture: Architecture) -> bool:
        """Returns whether the output is another than the embedding, although config.json says that it is tied.

        transformers 5 computes with an output in the files (`PreTrainedModel.tie_weights`). Also, the embedding and the
        output may have factors of their own.
        """
        if architecture.encoder or not is_tied(self.config):
            return False
        output, embedding = architecture.output, architecture.embedding
        if embedding not in self._stored:
            return False
        if output not in self._stored:
            return self._factor(output) != self._factor(embedding)
        return not torch.equal(self.read(output), self.read(embedding))

    def _factor(self, name: str) -> Factor:
        """Returns what a tensor is multiplied by when it is read: `folded` of the architecture."""
        module = block_module(self._architecture, name) if self._architecture else None
        return self._factors.get(f"{module[1]}.{module[2]}" if module else name, 1.0)

    def _is_scaled(self, name: str) -> bool:
        return not np.all(np.equal(self._factor(name), 1))

    def _unstacked(self) -> dict[str, ExpertRows]:
        """Returns where stored tensors hold tensors of experts, which count as stored tensors from here on."""
        if self._architecture is None:
            return {}
        with well_formed(str(self.folder)):
            return experts_within(self._architecture, self.config, self._files, self._renamed, self.stored_shape)

    def _taken_apart(self) -> dict[str, Order]:
        """Lists the parts of fused linears instead of these; returns the rows of the fused linear that each has."""
        rows: dict[str, Order] = {}
        parts = self._architecture.parts if self._architecture else {}
        for name in [name for name in self._stored if name.endswith(tuple(f".{fused}.weight" for fused in parts))]:
            assert self._architecture is not None
            if orders := parts_of(self._architecture, self.config, name):
                taken = {self._renamed(part_name): order for part_name, order in orders.items()}
                if (count := self.shape(name)[0]) != (needed := sum(map(len, taken.values()))):
                    raise UserError(f"{self.folder}: {name} has {count} rows, where by config.json it has {needed}.")
                self._stored |= dict.fromkeys(taken, self._stored.pop(name))
                rows |= taken
        return rows

    def _extended(self) -> dict[str, Order]:
        """Returns the rows of tables that get as many rows as the embedding: the first one is in place of further ones.

        So does transformers look up tokens that such a table lacks.
        """
        orders: dict[str, Order] = {}
        for name in self._architecture.extended if self._architecture else ():
            assert self._architecture is not None
            if name in self._stored and self._architecture.embedding in self._stored:
                rows, wanted = self.shape(name)[0], self.shape(self._architecture.embedding)[0]
                orders |= {name: np.arange(wanted) * (np.arange(wanted) < rows)} if rows < wanted else {}
        return orders

    @property
    def fingerprint(self) -> str:
        hasher = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self._settings:
            hasher.update(path.read_bytes())
        for path in sorted(set(self._files.values())):
            stat = path.stat()
            with path.open("rb") as file:
                header = file.read(8 + min(int.from_bytes(file.read(8), "little"), 1 << 27))
            hasher.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode() + header)
        return hasher.hexdigest()

    def _renamed(self, name: str) -> str:
        """Returns the name in the model of a stored tensor. Checkpoints of some architectures use other names."""
        return renamed(name, self._patterns)

    def _is_transposed(self, name: str) -> bool:
        if self._architecture is None:
            return False
        module = block_module(self._architecture, name)
        return module is not None and module[2] == "weight" and module[1] in self._architecture.transposed

    def names(self) -> list[str]:
        return list(self._stored)

    def others(self) -> list[str]:
        """Returns the stored names of the tensors beside the text part, such as those of the part that reads images."""
        return [name for name in self._files if self._has_other_parts and re.search(OTHER_PARTS, name)]

    def module(self, name: str) -> str | None:
        """Returns the name by which `layout` knows the module of a quantized weight; None for any other tensor.

        Also None for a part of a fused linear, whose grid and codes are those of the whole, and for a weight that takes
        up factors of config.json.
        """
        return None if name in self._fused or self._is_scaled(name) else self._packed_module(name)

    def _packed_module(self, name: str) -> str | None:
        """Returns the name by which `layout` knows the module that a quantized weight is, or is a part of."""
        module, _, parameter = self._stored_name(name).rpartition(".")
        return module if self.layout and parameter == "weight" and self.layout.is_packed(module) else None

    def dtype(self, name: str) -> str:
        """Returns a tensor's dtype by safetensors' name, such as BF16.

        For a quantized weight it returns the method, the bits and the group size.
        """
        module = self._packed_module(name)
        if self.layout and module:
            return self.layout.quantization_name(module)
        return self.stored_form(self._stored_name(name))[0]

    def nbytes(self, name: str) -> int:
        """Returns the bytes of the stored tensors that a tensor is made of."""
        if name in self._fused:
            return math.prod(self.shape(name)) * DTYPE_BYTES.get(self.dtype(name), 1)
        forms = map(self.stored_form, self._parts(name))
        return sum(math.prod(shape) * DTYPE_BYTES.get(dtype, 1) for dtype, shape in forms)

    def _parts(self, name: str) -> list[str]:
        """Returns the names of the stored tensors that a tensor is made of."""
        module = self._packed_module(name)
        return self.layout.parts_of(module) if self.layout and module else [self._stored_name(name)]

    def file_spans(self, name: str) -> list[FileSpan]:
        """Returns where on disk the stored tensors of a tensor are."""
        return [self._span(stored) for stored in self._parts(name)]

    def _span(self, stored: str) -> FileSpan:
        if rows := self._experts.get(stored):
            path, start, nbytes = self._span(rows.stored)
            first, part = rows.span(self.stored_shape(rows.stored), nbytes)
            return FileSpan(path, start + first, part)
        path = self._file(stored)
        return FileSpan(path, *self._spans(path)[self._key(stored)])

    def _key(self, stored: str) -> str:
        """Returns the name of a stored tensor in its file: those of projections are alike."""
        return PROJECTION if stored in self._projections else stored

    @functools.cache  # noqa: B019 (a source is kept for the whole run anyway)
    def _spans(self, path: Path) -> dict[str, tuple[int, int]]:
        return spans(path)

    def shape(self, name: str) -> tuple[int, ...]:
        whole = self._whole_shape(name)
        if name not in self._fused:
            return whole
        return part_shape(whole, len(self._fused[name]), groups_of(self._architecture, self.config, name))

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape; of a part of a fused linear, that of the fused linear."""
        if self.layout and (module := self._packed_module(name)):
            return self.layout.shape(module)
        shape = self.stored_shape(self._stored_name(name))
        return shape[::-1] if self._is_transposed(name) else as_matrix(shape)

    def read(self, name: str) -> torch.Tensor:
        whole = self._whole(name)
        if self._is_scaled(name):
            factor = torch.tensor(self._factor(name), dtype=torch.float32)
            return whole.float() * (factor[:, None] if factor.ndim else factor)
        if name not in self._fused:
            return whole
        return part(whole, self._fused[name], groups_of(self._architecture, self.config, name))

    def _whole(self, name: str) -> torch.Tensor:
        """Reads a tensor; of a part of a fused linear, the fused linear."""
        if self.layout and (module := self._packed_module(name)):
            return torch.from_numpy(self.layout.read(module))
        tensor = self.stored_tensor(self._stored_name(name))
        return tensor.T.contiguous() if self._is_transposed(name) else tensor.reshape(as_matrix(tuple(tensor.shape)))

    def stored_form(self, stored: str) -> tuple[str, tuple[int, ...]]:
        """Returns the dtype, by safetensors' name, and the shape of a stored tensor.

        stored   its name in the files

        Raises UserError if it is missing.
        """
        if rows := self._experts.get(stored):
            dtype, shape = self.stored_form(rows.stored)
            return dtype, rows.shape(shape)
        return self._forms(self._file(stored))[self._key(stored)]

    @functools.cache  # noqa: B019 (a source is kept for the whole run anyway)
    def _forms(self, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns the dtype and the shape of all tensors of a file, which is opened once for all of them."""
        with _open(path) as file:
            return forms(file)

    def stored_shape(self, stored: str) -> tuple[int, ...]:
        """Returns the shape of a stored tensor."""
        return self.stored_form(stored)[1]

    def stored_tensor(self, stored: str) -> torch.Tensor:
        """Returns a stored tensor by its name in the files. Raises UserError if it is missing or damaged."""
        if rows := self._experts.get(stored):
            with _open(self._file(rows.stored)) as file:
                return rows.read(file.get_slice(rows.stored))
        path, key = self._file(stored), self._key(stored)
        if (small := small_tensor(path, self._spans(path)[key], *self.stored_form(stored))) is not None:
            return small
        with _open(path) as file:  # not kept open: its mapped pages would count as memory of the run
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    def _file(self, stored: str) -> Path:
        if stored not in self._files:
            raise UserError(f"{self.folder} has no tensor {stored}. Is the download complete?")
        return self._files[stored]

    def _stored_name(self, name: str) -> str:
        if name not in self._stored:
            raise UserError(f"{self.folder} has no tensor {name}. Is the download complete?")
        return self._stored[name]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    def has_tokenizer(self) -> bool:
        """Returns whether the folder has a file that holds a vocabulary."""
        return any((self.folder / name).is_file() for name in VOCABULARIES)

    def copy_model_files(self, folder: Path) -> None:
        copied = [path for pattern in MODEL_FILES for path in self.folder.glob(pattern) if pattern != "config.json"]
        copy_files(self.folder, copied, folder)
        if self._is_split_tokenizer():
            write_json(folder / "tokenizer.json", json.loads(self.tokenizer().backend_tokenizer.to_str()))
        write_json(folder / "config.json", self.config)

    def gives_tokenizer_json(self) -> bool:
        """Returns whether the folder that `copy_model_files` writes has a tokenizer.json."""
        return (self.folder / "tokenizer.json").is_file() or self._is_split_tokenizer()

    def _is_split_tokenizer(self) -> bool:
        """Returns whether vocab.json and merges.txt are all of the tokenizer.

        How words are split is then known to transformers' class alone.
        """
        whole, parts = VOCABULARIES[:2], ("vocab.json", "merges.txt")
        has = {name: (self.folder / name).is_file() for name in (*whole, *parts)}
        return all(has[name] for name in parts) and not any(has[name] for name in whole)


class GGUFSource(GGUFModel):
    """A .gguf file as a source. Packed tensors are decoded to float32 when they are read."""

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
        with tempfile.TemporaryDirectory() as temporary:
            write_tokenizer(self.metadata, Path(temporary), self.path)
            return load_tokenizer(Path(temporary), self.path)

    def copy_model_files(self, folder: Path) -> None:
        write_tokenizer(self.metadata, folder, self.path)
        keep(self.path, folder)
        write_json(folder / "config.json", self.config)


def open_source(name: str) -> Source:
    """Opens the model `name`: a folder, a .gguf file, or else a hub id, which is downloaded.

    Raises UserError if there is no such model or it is incomplete.
    """
    path = Path(name)
    check_source_name(name)
    if is_gguf(path):
        return GGUFSource(path)
    if path.is_dir():
        return HuggingFaceSource(path, name)
    return HuggingFaceSource(_download(name), name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*MODEL_FILES, *OTHER_FILES, "*.safetensors", "model.safetensors.index.json", *QUANTIZATION_FILES]
    with hub() as unreached:
        try:
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:
            reason = f"{unreached} {error}".strip().split("\n")[0]
            raise UserError(NOT_WITHIN_REACH.format(name, reason)) from error


def _check_is_model(folder: Path) -> None:
    """Raises UserError for a folder of an adapter or of a diffusion model, which people take for a model's."""
    if (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").is_file():
        settings = read_json(folder / "adapter_config.json", "")
        base = settings.get("base_model_name_or_path") or "its base model"
        raise UserError(
            f"{folder} holds an adapter of {base}, and no whole model: load both with PEFT, call merge_and_unload(), "
            "save the result with save_pretrained(), and give that folder."
        )
    if (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} holds a diffusion model (model_index.json), and only language models and encoders of text are "
            "quantized: give the folder of one of them."
        )


def _missing(path: Path) -> str:
    folder = path.parent
    models = [str(file.parent) for pattern in (f"*/{path.name}", f"snapshots/*/{path.name}")
              for file in sorted(folder.glob(pattern))]  # fmt: skip
    within = f" Give the folder of a model: {listed(models, 3)}." if models else ""
    return f"{folder} has no {path.name}: it is not a Hugging Face model folder.{within}"


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the file of each tensor by the tensor's name, from the index if there is one, else from the only file.

    Raises UserError as `_check_shards`, and if there are both, and the index is of other files.
    """
    index, path = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        with well_formed(index, "Download it again."):
            files = {
                name: _beside(index, file) for name, file in read_json(index, _missing(index))["weight_map"].items()
            }
        if path.is_file() and path not in files.values():
            raise UserError(
                f"{folder} holds two models: {path.name}, which transformers reads, and the files of {index.name}. "
                "Delete the one that is out of date."
            )
        _check_shards(files)
        return files
    if not path.is_file():
        # AutoGPTQ put the bits and the group size into the file name.
        candidates = list(folder.glob("[!.]*.safetensors"))
        if len(candidates) != 1:
            raise UserError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json."
                + _about_pickles(folder) * _has_pickles(folder)
            )
        (path,) = candidates
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _check_shards(files: dict[str, Path]) -> None:
    """Raises UserError if a shard is missing or cut short, or lacks a tensor that the index says it has.

    This is checked at the start, so that the run does not fail hours later.
    """
    by_file: dict[Path, list[str]] = {}
    for name, path in files.items():
        by_file.setdefault(path, []).append(name)
    for path, names in sorted(by_file.items()):
        with _open(path) as file:
            present = set(file.keys())
        if missing := [name for name in names if name not in present]:
            raise UserError(f"{path} has no tensor {', '.join(missing[:5])}, which its index says it has.")


def _beside(index: Path, name: str) -> Path:
    """Returns the path of a file that an index names. Raises UserError if it is in another folder than the index."""
    if name != Path(name).name or name == "..":
        raise UserError(f"{index} names a file in another folder, {name}: shards lie beside their index.")
    return index.with_name(name)


def _about_pickles(folder: Path) -> str:
    """Returns what to do with a folder of pickled weights, which transformers reads without running their code."""
    to = folder.resolve()
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"[part.from_pretrained({str(to)!r}).save_pretrained({str(to.with_name(to.name + '-safetensors'))!r}) "
        "for part in (AutoModelForCausalLM, AutoTokenizer)]"
    )
    return (
        " Files of pickled weights (.bin, .pt) are not read: they can run any code. This converts a model that "
        f"transformers reads: {shlex.join(['python', '-c', code])}"
    )


def _has_pickles(folder: Path) -> bool:
    return any(folder.glob("*.bin")) or any(folder.glob("*.pt"))


def _open(path: Path) -> AbstractContextManager[Any]:
    return open_tensors(path, "pt", "Download it again.")
