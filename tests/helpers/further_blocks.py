"""Small random models with a block that predicts further tokens, as checkpoints have it, and that block's logits."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from family_cases import CASES, make_model, make_tokenizer
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from lqexport.evaluation import llamacpp

QWEN = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "shared_head.norm": "norm"}
"""The names in Qwen's checkpoints, under `mtp`, of what such a block has beside a decoder block."""
SECOND_NORM = "post_attention_layernorm"


class Predicting:
    """A case of `family_cases` with one block more, which predicts the token after the next.

    model    transformers' model, without that block
    count    the number of such blocks
    block    the tensors of that block that a decoder block has
    beside   its other tensors, by DeepSeek's names
    """

    count = 1

    def __init__(self, name: str, own_vocabulary: bool = False) -> None:
        self.name, self.model = name, make_model(name)
        self.layers = self.model.config.num_hidden_layers
        draw = torch.Generator().manual_seed(1)
        last, hidden = self.model.model.layers[-1].state_dict(), self.model.config.hidden_size
        self.block = {end: value + 0.02 * torch.randn(value.shape, generator=draw) for end, value in last.items()}
        self.one = 0 if name.startswith("qwen") else 1  # what the weights of norms have around them
        self.beside = {
            f"{norm}.weight": self.one + 0.1 * torch.randn(hidden, generator=draw)
            for norm in ("enorm", "hnorm", "shared_head.norm")
        } | {"eh_proj.weight": 0.05 * torch.randn(hidden, 2 * hidden, generator=draw)}
        if own_vocabulary:
            self.beside |= {
                f"{name}.weight": 0.2 * torch.randn(self.model.config.vocab_size, hidden, generator=draw)
                for name in ("embed_tokens", "shared_head.head")
            }

    def names(self) -> dict[str, Tensor]:
        """Returns the block's tensors under the names that a checkpoint gives them."""
        if self.one:
            parts = {end: part for each in self.block.items() for end, part in _unstacked(*each).items()}
            return {f"model.layers.{self.layers}.{end}": value for end, value in (parts | self.beside).items()}
        beside = {f"mtp.{QWEN[end.removesuffix('.weight')]}.weight": value for end, value in self.beside.items()}
        return {f"mtp.layers.0.{end}": value for end, value in self.block.items()} | beside

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the block's tensors by the ends of our names, with stacked experts."""
        return {end: tuple(value.shape) for end, value in (self.block | self.beside).items()}

    def save(self, folder: Path) -> Path:
        """Writes the checkpoint with that block, and a tokenizer, into a new folder `hf`. Returns that."""
        self.model.save_pretrained(folder / "hf")
        make_tokenizer(CASES[self.name][2], folder).save_pretrained(folder / "hf")
        path = folder / "hf" / "model.safetensors"
        stored = safetensors.torch.load_file(path)
        safetensors.torch.save_file(stored | self.names(), path, {"format": "pt"})
        return folder / "hf"

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        """Returns the logits of the token after the next one, of all tokens but the last.

        They are computed by transformers' own block, alone in a model whose inputs are those of the block.
        """
        hidden = self._hidden(tokens)[:-1]
        table = self.beside.get("embed_tokens.weight", self.model.get_input_embeddings().weight)
        embedded = table[torch.tensor(tokens[1:])]
        joined = torch.cat((self._norm(embedded, "enorm"), self._norm(hidden, "hnorm")), dim=-1)
        inputs = joined @ self.beside["eh_proj.weight"].T
        return self._alone()(inputs_embeds=inputs[None], use_cache=False).logits[0].numpy()

    def _hidden(self, tokens: list[int]) -> Tensor:
        return self.model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]

    def _norm(self, values: Tensor, norm: str) -> Tensor:
        root = (values.square().mean(-1, keepdim=True) + _epsilon(self.model.config)).rsqrt()
        return values * root * (self.beside[f"{norm}.weight"] + 1 - self.one)

    def _alone(self) -> PreTrainedModel:
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers = 1
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"]
        if hasattr(config, "first_k_dense_replace"):
            config.first_k_dense_replace = 0
        for key, value in (("mlp_layer_types", "sparse"), ("indexer_types", "full")):
            if hasattr(config, key):
                setattr(config, key, [value])
        return self._filled(type(self.model)(config).eval())

    def _filled(self, alone: PreTrainedModel) -> PreTrainedModel:
        """Returns a model of one block with this block's weights, and the vocabulary's."""
        alone.model.layers[0].load_state_dict(self.block)
        alone.model.norm.weight.copy_(self.beside["shared_head.norm.weight"])
        alone.model.embed_tokens.weight.copy_(self.model.model.embed_tokens.weight)
        alone.lm_head.weight.copy_(self.beside.get("shared_head.head.weight", self.model.lm_head.weight))
        return alone


class PredictingInTwo(Predicting):
    """A case of Nemotron 3, whose block is two blocks in checkpoints: one with attention, one with experts."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        draw, types = torch.Generator().manual_seed(2), self.model.config.layer_types
        attention, experts = (
            self.model.model.layers[types.index(each)].state_dict() for each in ("full_attention", "moe")
        )
        experts[f"{SECOND_NORM}.weight"] = experts.pop("norm.weight")
        self.block = {
            end: value + 0.02 * torch.randn(value.shape, generator=draw) for end, value in (attention | experts).items()
        }

    def names(self) -> dict[str, Tensor]:
        parts = {f"{number}.{end}": value for number in (0, 1) for end, value in self._stored_block(number).items()}
        beside = {("1.final_layernorm.weight" if "head" in end else f"0.{end}"): v for end, v in self.beside.items()}
        return {
            f"mtp.layers.{end}": part for each in (parts | beside).items() for end, part in _unstacked(*each).items()
        }

    def _stored_block(self, number: int) -> dict[str, Tensor]:
        """Returns the tensors of the first or the second block of a checkpoint, with stacked experts."""
        first = {"norm.weight", *(f"mixer.{name}_proj.weight" for name in "qkvo")}
        return {
            end.replace(SECOND_NORM, "norm"): value
            for end, value in self.block.items()
            if (end in first) == (number == 0)
        }

    def _alone(self) -> PreTrainedModel:
        config = copy.deepcopy(self.model.config)
        config.layers_block_type = ["full_attention", "moe"]
        alone = type(self.model)(config).eval()
        for number, layer in enumerate(alone.model.layers):
            layer.load_state_dict(self._stored_block(number))
        alone.model.norm_f = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon, bias=False)
        alone.model.norm_f.weight.copy_(self.beside["shared_head.norm.weight"])
        alone.lm_head.weight.copy_(self.model.lm_head.weight)
        return alone


class PredictingInWindows(Predicting):
    """A case of MiMo V2 Flash with two equal blocks with a sliding window and no experts, which see states unnormed."""

    count = 2

    def __init__(self, name: str) -> None:
        super().__init__(name)
        draw = torch.Generator().manual_seed(2)
        like = self.model.model.layers[self.model.config.layer_types.index("sliding_attention")].state_dict()
        self.block = {end: value + 0.02 * torch.randn(value.shape, generator=draw) for end, value in like.items()}

    def names(self) -> dict[str, Tensor]:
        stored = {"post_attention_layernorm.weight": "pre_mlp_layernorm.weight"}
        stored |= {"self_attn.sinks": "self_attn.attention_sink_bias"}
        stored |= {"shared_head.norm.weight": "final_layernorm.weight"}
        return {
            f"model.mtp.layers.{number}.{stored.get(end, end)}": value.clone()
            for number in range(self.count)
            for end, value in (self.block | self.beside).items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().shapes()
        parts = [shapes.pop(f"self_attn.{name}_proj.weight") for name in "qkv"]
        return shapes | {"self_attn.qkv_proj.weight": (sum(rows for rows, _ in parts), parts[0][1])}

    def _hidden(self, tokens: list[int]) -> Tensor:
        states: list[Tensor] = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
        super()._hidden(tokens)
        hook.remove()
        return states[0]

    def _alone(self) -> PreTrainedModel:
        config = copy.deepcopy(self.model.config)
        config.num_hidden_layers, config.layer_types, config.mlp_layer_types = 1, ["sliding_attention"], ["dense"]
        return self._filled(type(self.model)(config).eval())


def predicting(name: str) -> Predicting:
    """Returns the model of a case with a block that predicts a further token."""
    classes = {"nemotron-h": PredictingInTwo, "mimo2": PredictingInWindows}
    return next((made for start, made in classes.items() if name.startswith(start)), Predicting)(name)


def _epsilon(config: Any) -> float:
    return float(getattr(config, "rms_norm_eps", 0) or config.layer_norm_epsilon)


def _unstacked(name: str, value: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of single experts for one that holds those of all; any other tensor as it is."""
    prefix, _, linear = name.partition("experts.")
    if linear not in ("gate_up_proj", "up_proj", "down_proj"):
        return {name: value}
    ends = ("gate_proj", "up_proj") if linear == "gate_up_proj" else (linear,)
    return {
        f"{prefix}experts.{number}.{end}.weight": part.clone()
        for number, expert in enumerate(value)
        for end, part in zip(ends, expert.chunk(len(ends)), strict=True)
    }


def logits_in_llamacpp(path: Path, tokens: list[int], hidden: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns the model's logits, and those of `Predicting.logits`, by llama.cpp.

    llama.cpp has no C function for the hidden states that such a block takes; its C++ functions are called.
    """
    llama, _ = llamacpp.library()
    keep = llama._Z26llama_set_embeddings_nextnP13llama_contextbb
    states = llama._Z26llama_get_embeddings_nextnP13llama_context
    keep.argtypes, states.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool], [ctypes.c_void_p]
    states.restype = ctypes.POINTER(ctypes.c_float)
    with llamacpp.LlamaCpp(path, 64, threads=1) as engine:
        assert engine.warnings == []
        keep(engine._context, True, False)
        logits = engine.logits(tokens)
        inputs = np.ctypeslib.as_array(states(engine._context), (len(tokens), hidden))[:-1].copy()
        parameters = engine._context_parameters(1, False)
        parameters.ctx_type, parameters.ctx_other = 1, engine._context
        context = llama.llama_init_from_model(engine._model, parameters)
        keep(context, True, True)
        ids, wanted = np.array(tokens[1:], np.int32), np.ones(len(tokens) - 1, np.int8)
        batch = llamacpp._Batch(n_tokens=len(ids), token=ids.ctypes.data, embd=inputs.ctypes.data,
                                logits=wanted.ctypes.data)  # fmt: skip
        assert llama.llama_decode(context, batch) == 0
        further = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), engine.n_vocab)).copy()
        llama.llama_free(context)
    return logits, further
