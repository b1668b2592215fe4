"""What the program knows of a family of models. The entries, one per architecture, are in `architectures.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

Config = dict[str, Any]
"""The content of config.json."""

MEAN, FIRST = 1, 2
"""What an encoder's embedding is made of, all tokens' hidden states or the first one's: llama.cpp's numbers, which
config.json gets as `pooling_type`, too."""
EACH = "*"
"""Stands for the number of an expert in the name of a module."""
GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
"""A gated MLP: module -> its name in GGUF."""


@dataclass(frozen=True)
class Key:
    """A number that llama.cpp reads from the file's metadata as `ARCHITECTURE.name` and Hugging Face from config.json.

    kind      int, float or bool
    default   what config.json means where it does not say; None: it must say
    """

    name: str
    config: str
    kind: type = int
    default: Any = None


@dataclass(frozen=True)
class ExLlamaV2:
    """What ExLlamaV2 0.3.2 (exllamav2/architecture.py) says of an architecture that it loads.

    biased    linears to which it adds a bias, whatever config.json says
    split     linear -> the linears as which it is stored, its rows one after the other
    renamed   regular expressions that turn our names into those of its files
    keys      key of config.json that it reads -> the usual one
    called    what config.json must name in `architectures`, where that is another
    """

    biased: tuple[str, ...] = ()
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    called: str | None = None


@dataclass(frozen=True)
class Architecture:
    """How a family's models are built, what their tensors are called, and what llama.cpp must be told of them.

    family      what people call it
    classes     names in `architectures` of config.json; the first one is that of a model read from GGUF
    model_type  that of config.json
    gguf        `general.architecture` of llama.cpp; None where it has none
    exl2        what ExLlamaV2 says of it; None where it does not load it, or computes it wrongly
    linears     quantized linears of a block, in groups that share their input, in the order in which data flows
    gguf_block  Hugging Face module of a block -> GGUF name of the same module; or of a tensor, with its `.bias`
    gguf_top    Hugging Face tensor outside the blocks -> GGUF tensor
    when        key of config.json -> the values by which it is told from others of the same class
    experts     key of config.json with the number of experts, by which `*` in names of modules is expanded
    dense       key of config.json with the number of the first blocks that have a gated MLP in the place of experts;
                None where all blocks are alike
    leading     that number, in an entry for a certain model
    rows        linear -> how llama.cpp orders its rows, and the key of config.json with the number of groups: `rope`,
                the halves of each head interleaved, or `qkv`, all queries, keys and values instead of a few of each
    transposed  linears that a checkpoint stores as [inputs, outputs]
    renamed     regular expressions that turn names of a checkpoint's tensors into those of the modules
    unused      regular expressions for tensors of a checkpoint that follow from config.json
    norm_plus   what llama.cpp's norms hold more than Hugging Face's
    keys        metadata beside the sizes, which every architecture has
    aliases     other names of keys in config.json -> the usual ones
    defaults    what config.json means where it does not say
    derived     what the rest of config.json implies, whatever it says
    fixed       key of config.json -> the values that llama.cpp computes with; any other is refused
    flags       key of config.json -> the module whose bias shows that it is true
    rope_types  the kinds of rope scaling that llama.cpp computes for it; () where positions are learned
    period      by default every so many blocks attend to the whole context, and the others to `sliding_window` tokens;
                None where llama.cpp ignores windows, so that the context may be no longer than one
    free_heads  whether config.json may give heads another size than hidden_size / heads
    latent      whether keys and values are made of one vector for all heads (multi-head latent attention), with parts
                of a head that are rotated and others that are not
    encoder     whether every token sees the whole text and there is no output layer: the model gives an embedding of
                the text, made of the hidden states after the last block
    adds        whether the outputs of attention and MLP are added to the hidden states as they are
    wide_scale  number of blocks of the one model whose queries llama.cpp divides by the root of hidden_size / heads
                instead of head_dim
    """

    family: str
    classes: tuple[str, ...]
    model_type: str
    gguf: str | None
    linears: tuple[tuple[str, ...], ...]
    gguf_block: dict[str, str]
    gguf_top: dict[str, str]
    exl2: ExLlamaV2 | None = None
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    experts: str | None = None
    dense: str | None = None
    leading: int = 0
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    norm_plus: int = 0
    keys: tuple[Key, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    defaults: Config = field(default_factory=dict)
    derived: Callable[[Config], Config] = lambda config: {}
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    period: int | None = None
    free_heads: bool = True
    latent: bool = False
    encoder: bool = False
    adds: bool = True
    wide_scale: int | None = None
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    output: str = "lm_head.weight"

    @property
    def adders(self) -> tuple[str | None, str | None]:
        """The linears of attention and of the MLP whose outputs are added to the hidden states as they are."""
        modules = {gguf: module for module, gguf in self.gguf_block.items()}
        return (modules["attn_output"], modules["ffn_down"]) if self.adds and not self.experts else (None, None)

    def modules_of(self, block: int) -> dict[str, str]:
        """`gguf_block` of one block."""
        return {module: gguf for module, gguf in self.gguf_block.items() if self._has(block, module)}

    def linears_of(self, block: int) -> tuple[tuple[str, ...], ...]:
        """`linears` of one block."""
        return tuple(group for group in self.linears if self._has(block, group[0]))

    def _has(self, block: int, module: str) -> bool:
        if self.dense is None or not module.startswith("mlp."):
            return True
        return (module in GATED) == (block < self.leading)

    def expanded(self, count: int, leading: int = 0) -> Architecture:
        """The same with `count` experts in the place of each `*`, from block `leading` on."""
        modules = [
            (module.replace(EACH, str(number)), gguf)
            for module, gguf in self.gguf_block.items()
            for number in range(count if EACH in module else 1)
        ]
        groups = [
            tuple(linear.replace(EACH, str(number)) for linear in group)
            for group in self.linears
            for number in range(count if EACH in group[0] else 1)
        ]
        return replace(self, gguf_block=dict(modules), linears=tuple(groups), leading=leading)
