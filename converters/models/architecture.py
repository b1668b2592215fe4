"""The record of what the program knows about a family of models. `architectures.py` has one entry per architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Config = dict[str, Any]
"""The content of config.json."""
Order = NDArray[np.int64]
"""Numbers of rows or columns, in an order in which they are put or taken."""
Factor = float | NDArray[np.float32]
"""By what a matrix is multiplied: one number, or one for each row."""

MEAN, FIRST = 1, 2
"""How an encoder pools: the mean of all tokens' hidden states, or the first token's hidden state.

The numbers are llama.cpp's. A config.json that is rebuilt from GGUF has them as `pooling_type`."""
EACH = "*"
"""The placeholder for an expert's number in the name of a module."""
KEY_HEADS = "attention.head_count_kv"
"""The name of the GGUF key with the number of key heads, which may be an array with one number for each block."""
WINDOW_PERIOD = "attention.sliding_window_pattern"
"""The name of the GGUF key with the period of blocks with a window, or with an array that says which have one."""
BORROWED = ("self_attn.k_proj", "self_attn.k_norm", "self_attn.v_proj", "self_attn.v_norm")
"""The modules that a block does not use if it takes the keys and values of an earlier block."""
GATED = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
"""The modules of a gated MLP: Hugging Face module -> GGUF name."""


PREDICTOR = {
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
"""The modules that a block which predicts further tokens has beside those of a decoder block.

Hugging Face module -> GGUF name."""
FURTHER_COUNT = "num_nextn_predict_layers"
"""The key of config.json with the number of blocks that predict further tokens."""
CUT = "kv_b_proj_in_two"
"""The key of config.json that says whether `kv_b_proj` of a `cuttable` model is cut in two."""
LENT = ("embed_tokens", "shared_head.head")
"""Those of `PREDICTOR` that a block may lack. It uses the model's embedding and output then."""

TOKEN_DIGITS = 3
"""How many digits to the base 256 stand for the number of a token beside hidden states.

Every type of floats holds such a digit exactly."""

THREE_DIMENSIONAL = ("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v")
"""The GGUF names of those convolutions that GGUF holds as [channels, 1, width], too."""
CONVOLUTIONS = ("shortconv.conv", "ssm_conv1d", *THREE_DIMENSIONAL)
"""The GGUF names of convolutions over single channels, which checkpoints store as [channels, 1, width]."""


@dataclass(frozen=True)
class Key:
    """A setting that llama.cpp reads from the GGUF metadata and Hugging Face from config.json.

    name         its GGUF key is `ARCHITECTURE.name`
    config       its key in config.json
    value_type   int, float or bool
    default      the value where config.json does not have the key or has null; None where it must have it
    rope         whether config.json has it among the settings of the rotary embedding (`rope_parameters`)
    many         whether config.json has a list of such values, and GGUF an array, such as one value for each block
    further      the key of config.json with the value that such an array has for each block that predicts further
                 tokens; None where it has none for these
    """

    name: str
    config: str
    value_type: type = int
    default: Any = None
    rope: bool = False
    many: bool = False
    further: str | None = None


@dataclass(frozen=True)
class Stack:
    """A tensor of a checkpoint that holds tensors of all experts of a block, [experts, rows, ...].

    tensors       the tensors of each expert, with `*` in place of its number; they have equal shares of the rows
    interleaved   whether the tensors take turns row by row; if not, each has a run of rows
    transposed    whether it is [experts, columns, rows]
    columns       key of config.json with the number of columns, where some checkpoints are transposed: those whose last
                  dimension is another one; None where all are alike
    """

    tensors: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    columns: str | None = None


@dataclass(frozen=True)
class ExLlamaV2:
    """The rules by which ExLlamaV2 0.3.2 loads an architecture (exllamav2/architecture.py).

    biased    linears to which it adds a bias, whatever config.json says
    split     fused linear -> the linears that its files hold instead; each holds a run of the fused linear's rows
    renamed   regular expression -> replacement; together they turn our tensor names into those of its files
    keys      key of config.json that it reads -> the usual key
    called    the class name that config.json must have in `architectures`, where it is not the usual one
    """

    biased: tuple[str, ...] = ()
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    called: str | None = None


@dataclass(frozen=True)
class Architecture:
    """How a family's models are built, how their tensors are named, and which metadata llama.cpp needs.

    family      the family's usual name
    classes     class names in `architectures` of config.json; a model that is read from GGUF gets the first one
    model_type  `model_type` of config.json
    gguf        `general.architecture` of llama.cpp; None where llama.cpp does not run the architecture
    exl2        ExLlamaV2's rules; None where it does not load the architecture, or computes it wrongly
    linears     quantized linears of a block, in groups that share their input, in the order in which data flows
    gguf_block  Hugging Face module of a block -> GGUF name of that module
    gguf_tensors  Hugging Face tensor of a block that is no module's weight or bias, or a bias without which llama.cpp
                does not load the model -> GGUF tensor; both names are whole
    numbers     Hugging Face tensor of a block with one number -> key of the GGUF metadata that has these numbers of all
                blocks, as an array. GGUF has no such tensor
    shaped      vector of a block -> its shape in checkpoints, -1 for its length; () for a number
    gguf_top    Hugging Face tensor outside the blocks -> GGUF tensor
    when        key of config.json (of its text part, if it has one) -> the values that tell this entry from others of
                the same class
    told        returns whether the entry is for a config.json, beside `when`
    experts     key of config.json with the number of experts; `*` in the names of modules is expanded by that number
    dense       key of config.json with the number of leading blocks that have a gated MLP instead of experts; None
                where all blocks are alike
    leading     that number, in an entry for a certain model
    only        start of the names of modules and tensors of a block -> key of config.json with one value for each
                block, and the values with which a block has these, such as `layer_types` and `("full_attention",)`.
                The longest start of a name counts
    per_block   key -> its value for each block, in an entry for a certain model
    rows        linear or tensor -> the order in which llama.cpp wants its rows, and the key of config.json with the
                number of groups; `rope` interleaves the halves of each head, `qkv` puts all queries first, then all
                keys, then all values, `values` tiles value heads (`value_heads.py`), and `values_last` those that come
                after the rows of all queries and keys
    tiled       linears whose columns are value heads, which llama.cpp wants tiled (`value_heads.py`)
    parts       fused linear of a checkpoint -> a function of config.json that returns the linears which take its place,
                each with the numbers of its rows in the fused linear. They are submodules of the fused linear
    turned      linear of `parts` that holds its rows of the fused linear transposed, group by group -> key of
                config.json with the number of groups: [groups * columns, rows of a group]
    borrows     key of config.json with the number of the last blocks, which use keys and values of earlier blocks
    first_borrower   the number of the first of these blocks, in an entry for a certain model; None where there is none
    fills       whether llama.cpp loads the model only with keys and values in these blocks, too; files have zeros there
    streams     key of config.json with the number of hidden states that a token has between blocks; None for one
    merging     what merges them after the last block: a list of linears by which all but the first are multiplied
                (`streams.AltUp`), or a module that merges all of them (`streams.HyperConnections`)
    carries     whether blocks get more than hidden states: inputs of their own, or keys and values of earlier blocks
    shares_choices   whether a block may attend to the tokens that an earlier block has chosen. transformers' blocks
                then return the choice beside hidden states
    token_ids   whether blocks get the numbers of the tokens
    carried     returns the largest number of columns that states have beside hidden states
    tables      matrices outside the blocks of which a token needs one row, as of the embedding; stored in its type
    extended    those of them that may have fewer rows than the embedding in checkpoints; their first row is that of all
                further tokens
    rounded     linears of a block that are rounded and not solved, since transformers multiplies by their weights
                without calling them, so that their inputs are not seen
    transposed  linears that a checkpoint stores as [inputs, outputs]
    stacked     tensor of a block in a checkpoint that holds tensors of all experts -> which ones, and how
    one_row     modules and tensors of a block that are matrices of one row, which GGUF files may hold as vectors
    renamed     regular expression -> replacement; together they turn a checkpoint's tensor names into the modules'
    unused      regular expressions for tensors of a checkpoint that are ignored, such as tables that follow from
                config.json
    further     whether checkpoints may have more blocks than config.json says: they predict further tokens, and are
                ignored where `predictor` is empty. So are tensors under the name `mtp`, in any architecture
    predictor   modules that a block which predicts further tokens has beside those of a decoder block, `PREDICTOR`;
                {} where llama.cpp has no such blocks
    predicts_like   the values of the keys of `only` by which such a block has the modules of a decoder block, if the
                model has decoder blocks with these values. SLIDING if it has a sliding window
    joins       linear of `predictor` -> the linears of a checkpoint whose rows it has, one after the other, in such a
                block
    first_further   the number of the first of these blocks, in an entry for a certain model; None where there is none
    norm_plus   the number that llama.cpp's norm weights have added to Hugging Face's
    plain_norms   modules of a block that are norms to which nothing is added
    decays      tensors of a block that GGUF holds as -exp(value)
    columns     vectors of a block that GGUF holds as matrices of one column
    whole       tensors of a block that are tables of whole numbers
    grouped     vector of a block that GGUF holds as a matrix, or matrix that it holds as [groups, rows, columns] -> key
                of config.json with the number of groups
    keys        GGUF metadata beyond the sizes that every architecture has
    mark        one of these that is true in files of this entry, and absent or false in those of others with the same
                tensors; None where tensors tell
    aliases     this family's name of a key of config.json -> the usual name
    former      older key of config.json -> the usual name. transformers takes the older key where config.json has both
    folded      returns the factors of config.json that become parts of the weights when a checkpoint is read, by tensor
                of a block or whole name; by `derived` these factors are 1 from then on
    reads       further keys that `derived` reads
    derived     returns values that follow from the rest of config.json; they replace what it says
    restored    returns values of config.json that follow from those read from a GGUF file; they replace these
    fixed       key of config.json -> the values that llama.cpp computes with; any other value is refused
    same        key of config.json -> the key whose value it must have; any other value is refused
    refuses     returns why llama.cpp does not compute a model, as a sentence, where that follows from several keys of
                config.json; None where it does
    flags       key of config.json -> the module whose bias shows that it is true
    biased      whether llama.cpp loads it only with a bias in every module of a block
    rope_types  the types of rope scaling that llama.cpp computes for it; () where positions are learned
    partial     whether only a part of each head is rotated where `partial_rotary_factor` of config.json says so
    rope_sections  the default of `mrope_section`: how many pairs of columns are rotated by the position in time, in
                height and in width. In text these positions are equal. () where llama.cpp has no such sections
    unrounded_yarn  whether all models with yarn leave the borders of its ramp unrounded (`truncate` false in
                config.json). They are taken, although llama.cpp rounds the borders
    mscale      `rope.scaling.yarn_log_multiplier` for `mscale_all_dim` 1; None where llama.cpp does not read it
    only_mscale    the only `mscale_all_dim` with which llama.cpp computes yarn; None where it computes all
    period      the default n where every n-th block attends to the whole context and the others to `sliding_window`
                tokens; 1 where no model has windows; None where llama.cpp ignores windows, so that the context may be
                no longer than one window
    any_windows  whether GGUF says for each block whether it has a sliding window, so that no pattern is needed
    all_windows  whether every block has a sliding window, beside what else it attends to
    one_theta   whether config.json has rotary settings for each type of blocks, and llama.cpp rotates all blocks with
                one `rope_theta`
    needs_windows  whether llama.cpp computes it only with a sliding window in some blocks
    gated       whether the query projection has a query and a gate of the output for each head
    needs_types the values of keys of `only` that llama.cpp needs in some block
    free_heads  whether config.json may give heads another size than hidden_size / heads
    square_heads   whether llama.cpp wants heads whose sizes add up to hidden_size
    latent      whether keys and values are computed from one vector for all heads (multi-head latent attention), and
                only a part of each head is rotated
    absorbed    whether llama.cpp takes that vector as the key and the value of a single head. Each query is turned into
                its space, and what attention returns is turned back
    cuttable    whether llama.cpp also loads the models with `kv_b_proj` cut in two, `absorbed` then (`in_two` of
                `families/deepseek.py`). config.json says `CUT` where it is
    encoder     whether every token sees the whole text and there is no output layer: the model returns an embedding of
                the text, made of the hidden states after the last block
    pools_normed   whether an encoder's hidden states pass the final norm before they are pooled
    projections    matrix by which an encoder multiplies the pooled hidden states, one after the other -> the keys of
                config.json with its numbers of rows and of columns. A model has all of them or none
    adds        whether the outputs of attention and MLP are added to the hidden states unchanged
    wide_scale  the number of blocks of the one model whose queries llama.cpp divides by the root of hidden_size / heads
                instead of the root of head_dim; 0 where there is no such model, None where the scale is not checked
    """

    family: str
    classes: tuple[str, ...]
    model_type: str
    gguf: str | None
    linears: tuple[tuple[str, ...], ...]
    gguf_block: dict[str, str]
    gguf_top: dict[str, str]
    gguf_tensors: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)
    shaped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    exl2: ExLlamaV2 | None = None
    when: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    told: Callable[[Config], bool] = lambda config: True
    experts: str | None = None
    dense: str | None = None
    leading: int = 0
    only: dict[str, tuple[str, tuple[Any, ...]]] = field(default_factory=dict)
    per_block: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    borrows: str | None = None
    first_borrower: int | None = None
    fills: bool = False
    streams: str | None = None
    merging: str = ""
    carries: bool = False
    shares_choices: bool = False
    token_ids: bool = False
    carried: Callable[[Config], int] = lambda config: 0
    tables: tuple[str, ...] = ()
    extended: tuple[str, ...] = ()
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)
    tiled: tuple[str, ...] = ()
    parts: dict[str, Callable[[Config], dict[str, Order]]] = field(default_factory=dict)
    turned: dict[str, str] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    stacked: dict[str, Stack] = field(default_factory=dict)
    one_row: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)
    further: bool = False
    predictor: dict[str, str] = field(default_factory=dict)
    predicts_like: tuple[Any, ...] = ()
    joins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    first_further: int | None = None
    norm_plus: int = 0
    plain_norms: tuple[str, ...] = ()
    decays: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    grouped: dict[str, str] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    mark: str | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)
    folded: Callable[[Config], dict[str, Factor]] = lambda config: {}
    reads: tuple[str, ...] = ()
    derived: Callable[[Config], Config] = lambda config: {}
    restored: Callable[[Config], Config] = lambda config: {}
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    refuses: Callable[[Config], str | None] = lambda config: None
    flags: dict[str, str] = field(default_factory=dict)
    biased: bool = False
    rope_types: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    partial: bool = False
    rope_sections: tuple[int, ...] = ()
    unrounded_yarn: bool = False
    mscale: float | None = None
    only_mscale: float | None = None
    period: int | None = None
    any_windows: bool = False
    all_windows: bool = False
    one_theta: bool = False
    needs_windows: bool = False
    gated: bool = False
    needs_types: tuple[Any, ...] = ()
    free_heads: bool = True
    square_heads: bool = False
    latent: bool = False
    absorbed: bool = False
    cuttable: bool = False
    encoder: bool = False
    pools_normed: bool = False
    projections: dict[str, tuple[str, str]] = field(default_factory=dict)
    adds: bool = True
    wide_scale: int | None = None
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    output: str = "lm_head.weight"

    @property
    def adders(self) -> tuple[str | None, str | None]:
        """The linears of attention and of the MLP whose outputs are added to the hidden states unchanged.

        None for both where blocks differ in their modules, and for what blocks do not have.
        """
        if not self.adds or self.experts or self.only:
            return (None, None)
        modules = {gguf: module for module, gguf in self.gguf_block.items()}
        return (modules.get("attn_output"), modules.get("ffn_down"))

    @property
    def attends(self) -> bool:
        """Whether some block has attention."""
        return any(gguf.startswith(("attn_q", "attn_k")) for gguf in self.gguf_block.values())

    @property
    def has_mlps(self) -> bool:
        """Whether some block has an MLP that does not consist of experts alone."""
        return "ffn_up" in self.gguf_block.values()

    @property
    def in_parts(self) -> bool:
        """Whether an artifact holds the parts of a linear that transformers has as one."""
        starts = tuple(f"{fused}." for fused in self.parts)
        return any(module.startswith(starts) for module in self.gguf_block)

    def modules_of(self, block: int) -> dict[str, str]:
        """Returns the entries of `gguf_block` that the block with this number has, and those of `predictor`."""
        modules = {module: gguf for module, gguf in self.gguf_block.items() if self.has(block, module)}
        return modules | self.predictor if self.predicts(block) else modules

    def tensors_of(self, block: int) -> dict[str, str]:
        """Returns the entries of `gguf_tensors` and `numbers` that the block with this number has."""
        tensors = self.gguf_tensors | self.numbers
        return {name: gguf for name, gguf in tensors.items() if self.has(block, name)}

    @cached_property
    def linear_names(self) -> frozenset[str]:
        """The names of all `linears`. Those of experts are many, and every tensor is looked up."""
        return frozenset(linear for group in self.linears for linear in group)

    def linears_of(self, block: int) -> tuple[tuple[str, ...], ...]:
        """Returns the groups of `linears` that the block with this number has."""
        groups = (tuple(linear for linear in group if self.has(block, linear)) for group in self.linears)
        return tuple(group for group in groups if group)

    def has(self, block: int, module: str) -> bool:
        """Returns whether the block with this number has a module of `gguf_block`, or a tensor."""
        if self.is_borrowed(block, module) or self.is_joined(block, module):
            return False
        if (condition := self.condition(module)) is not None:
            key, values = condition
            of_blocks = self.per_block[key]
            # A damaged file may have fewer blocks than it says.
            given = set(self.predicts_like) & set(of_blocks) if self.predicts(block) else of_blocks[block : block + 1]
            if not any(value in values for value in given):
                return False
        if self.dense is None or not module.startswith("mlp."):
            return True
        return (module in GATED) == (block < self.leading)

    def is_matrix(self, module: str) -> bool:
        """Returns whether a module of a block is a linear, solved or rounded."""
        return module in self.rounded or module in self.linear_names

    def predicts(self, block: int) -> bool:
        """Returns whether the block with this number predicts further tokens."""
        return self.first_further is not None and block >= self.first_further

    def is_joined(self, block: int, module: str) -> bool:
        """Returns whether a module's rows are those of another linear in the block with this number."""
        return self.predicts(block) and any(module in parts for parts in self.joins.values())

    def condition(self, module: str) -> tuple[str, tuple[Any, ...]] | None:
        """Returns the entry of `only` for a module or tensor of a block; None if all blocks have it."""
        starts = [start for start in self.only if module.startswith(start)]
        return self.only[max(starts, key=len)] if starts else None

    def is_borrowed(self, block: int, module: str) -> bool:
        """Returns whether a module of the block with this number is not used, since an earlier block's stands in."""
        return self.first_borrower is not None and block >= self.first_borrower and module in BORROWED

    def expanded(
        self,
        count: int,
        leading: int = 0,
        per_block: dict[str, tuple[Any, ...]] | None = None,
        first_borrower: int | None = None,
        first_further: int | None = None,
    ) -> Architecture:
        """Returns the entry with `count` experts in place of each `*`, from block `leading` on.

        per_block   see the field of that name; None where all blocks have the same modules
        first_borrower, first_further   see the fields of these names
        """
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
        return replace(
            self,
            gguf_block=dict(modules),
            linears=tuple(groups),
            leading=leading,
            per_block=per_block or {},
            first_borrower=first_borrower,
            first_further=first_further if self.predictor else None,
        )
