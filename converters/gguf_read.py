"""Reading a GGUF file as a Hugging Face model: names, config, decoded weights. Trusts nothing in the file."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lqexport.converters.architectures import ARCHITECTURES, Architecture
from lqexport.converters.gguf_header import TensorData, read_header
from lqexport.converters.rope import ROPE_FACTORS, llama3_factors, rope_heads, rope_order
from lqexport.converters.tensor_names import gguf_names
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.registry import codec, names


class GGUFModel:
    """A GGUF file, memory-mapped, with `names`, `shape`, `read` and `config` as in `lqexport.weights.Weights`.

    metadata   every key of the file, as Python values
    config     the model's config.json, rebuilt from the metadata

    Raises UserError where the file is missing, truncated, not GGUF, or of an architecture or with tensors that are
    not in the table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self._tensors = read_header(path)
        if self.metadata.get("general.type") == "adapter":
            raise UserError(f"{path} is an adapter, not a model: give it as --adapter beside the model that it is for.")
        self._architecture = self._known_architecture()
        self._names = self._known_names()

    def _known_architecture(self) -> Architecture:
        name = self.metadata.get("general.architecture")
        for architecture in ARCHITECTURES:
            if architecture.gguf == name:
                return architecture
        known = ", ".join(architecture.gguf for architecture in ARCHITECTURES)
        raise UserError(f"{self.path} holds a model of architecture {name!r}. Known: {known}.")

    def _known_names(self) -> dict[str, str]:
        """Hugging Face name -> GGUF name of the file's tensors, in the order of the model."""
        # A block holds more than one tensor; a damaged count must not make billions of names.
        known = gguf_names(self._architecture, int(min(self._number("block_count"), len(self._tensors))))
        unknown = self._tensors.keys() - known.values() - {ROPE_FACTORS}
        unknown |= {name for name, tensor in self._tensors.items() if len(tensor.shape) > 2}
        if unknown:
            raise UserError(
                f"{self.path} holds tensors that {self._architecture.gguf} does not have: {sorted(unknown)}."
            )
        present = {name: gguf for name, gguf in known.items() if gguf in self._tensors}
        needed = [name for name in known if name.endswith(".weight") and name != self._architecture.output]
        if missing := [known[name] for name in needed if name not in present]:
            raise UserError(f"{self.path} has no tensor {', '.join(missing[:5])}.")
        return present

    def names(self) -> list[str]:
        """Every tensor's Hugging Face name, in the order of the model."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as in a checkpoint, rows first."""
        return self._tensor(name).shape

    def codec(self, name: str) -> str:
        """The name of the codec that a tensor is stored in. Raises UserError for a type that is not known here."""
        kind = f"gguf:{self._tensor(name).kind}"
        if kind not in names("gguf"):
            raise UserError(
                f"{self.path}: {name} is of the type {kind}, which is not supported. Known: {names('gguf')}."
            )
        return kind

    def planes(self, name: str) -> tuple[str, Planes, tuple[int, ...]]:
        """Codec name, packed planes and shape of a tensor, its rows back in the order of Hugging Face."""
        kind, shape = self.codec(name), self.shape(name)
        layout = codec(kind).layout(*_matrix(shape))
        ((plane, (dtype, stored)),) = layout.items()
        rows = self._tensor(name).data.view(dtype).reshape(shape[0], -1)
        heads = rope_heads(self._architecture, self.config, name)
        if heads is not None:
            rows = rows[np.argsort(rope_order(shape[0], heads))]
        return kind, {plane: rows.reshape(stored)}, shape

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor's decoded weights, float32, in its shape. Raises UserError where any is infinite or not a number."""
        kind, planes, shape = self.planes(name)
        with np.errstate(invalid="ignore", over="ignore"):  # said below in a sentence
            weights = codec(kind).decode(planes, shape[-1]).reshape(shape)
        if not np.isfinite(weights).all():
            raise UserError(f"{self.path}: {name} holds weights that are infinite or not a number.")
        return weights

    def _tensor(self, name: str) -> TensorData:
        if name not in self._names:
            raise UserError(f"{self.path} has no tensor {name}.")
        return self._tensors[self._names[name]]

    def _number(self, key: str, default: float | None = None) -> Any:
        """A number of the architecture's own keys, such as `block_count` for `llama.block_count`."""
        full = f"{self._architecture.gguf}.{key}"
        value = self.metadata.get(full, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{self.path} gives no {full}.")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the model; a float32 of the file is given by its shortest decimal."""
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        dimension = self._number("rope.dimension_count", hidden // heads)
        config = {
            "architectures": [self._architecture.classes[0]],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": self._number("attention.key_length", dimension),
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": _decimal(self._number("attention.layer_norm_rms_epsilon")),
            "rope_parameters": self._rope(),
            "vocab_size": self.shape(self._architecture.embedding)[0],
            "tie_word_embeddings": self._architecture.output not in self._names,
            "attention_bias": any(name.endswith("q_proj.bias") for name in self._names),
            "mlp_bias": any(name.endswith("gate_proj.bias") for name in self._names),
        }
        ids = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        found = {key: self.metadata.get(f"tokenizer.ggml.{gguf}_token_id") for key, gguf in ids.items()}
        config |= {f"{key}_token_id": number for key, number in found.items() if number is not None}
        if ROPE_FACTORS in self._tensors:
            config["rope_parameters"] |= self._llama3(config)
        return config

    def _rope(self) -> dict[str, Any]:
        kind = self.metadata.get(f"{self._architecture.gguf}.rope.scaling.type", "none")
        rope = {"rope_type": "default", "rope_theta": _decimal(self._number("rope.freq_base", 10000.0))}
        if kind == "none":
            return rope
        if kind not in ("linear", "yarn"):
            raise UserError(f"{self.path} has rope scaling of type {kind!r}, which is not supported.")
        rope |= {"rope_type": kind, "factor": _decimal(self._number("rope.scaling.factor"))}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self._number("rope.scaling.original_context_length")
        return rope

    def _llama3(self, config: dict[str, Any]) -> dict[str, Any]:
        """Settings of rope_type `llama3`, recognized by the factors that they give; the file stores only those.

        Only the ratios to the original context length show in the factors, so that of every Llama 3 is taken.
        """
        factors = self._tensors[ROPE_FACTORS].data.view(np.float32)
        settings = {"rope_type": "llama3", "factor": _decimal(factors.max()), "low_freq_factor": 1.0}
        settings |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        expected = llama3_factors(config | {"rope_parameters": config["rope_parameters"] | settings})
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise UserError(f"{self.path}: {ROPE_FACTORS} is not what Llama 3 uses, so it cannot go into config.json.")
        return settings


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, columns]; a vector is one row."""
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the same float32: 1e-05, where the file's number is 9.999999747378752e-06."""
    return float(str(np.float32(value)))
