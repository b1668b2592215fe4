"""Sources with latent attention whose `kv_b_proj` is cut in two, or put together again.

llama.cpp attends to latent vectors where `kv_b_proj` is cut in two. Only there does it draft with the blocks of
DeepSeek V3 and GLM-4.7 Flash that predict further tokens. A file may have it cut where its source has it whole, and the
other way round.
"""

from __future__ import annotations

from torch import Tensor

from lqexport.converters.models.architecture import CUT, FURTHER_COUNT, Architecture, Config
from lqexport.converters.models.architectures import architecture_of, find_architecture, normalized
from lqexport.converters.models.further import further_blocks
from lqexport.models.fused_parts import groups_of, part, part_shape, parts_of, whole
from lqexport.models.joined import Joined
from lqexport.models.source import HuggingFaceSource, Source
from lqexport.models.source_view import SourceView


class InTwo(SourceView):
    """A source with whole `kv_b_proj`, each read as two linears."""

    def __init__(self, source: Source, config: Config) -> None:
        super().__init__(source)
        self.config = config
        self._architecture = architecture_of(config)
        self._rows = {
            name: (fused, rows)
            for fused in source.names()
            for name, rows in parts_of(self._architecture, config, fused).items()
        }

    def names(self) -> list[str]:
        within = {fused for fused, _ in self._rows.values()}
        return [*(name for name in self.source.names() if name not in within), *self._rows]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._rows:
            return self.source.shape(name)
        fused, rows = self._rows[name]
        return part_shape(self.source.shape(fused), len(rows), groups_of(self._architecture, self.config, name))

    def read(self, name: str) -> Tensor:
        if name not in self._rows:
            return self.source.read(name)
        fused, rows = self._rows[name]
        return part(self.source.read(fused), rows, groups_of(self._architecture, self.config, name))


class InOne(Joined):
    """A source with `kv_b_proj` cut in two, each pair read as the one linear that it was cut from."""

    def __init__(self, source: Source) -> None:
        self._cut, self._orders = architecture_of(source.config), {}
        for fused in _fused_names(self._cut, source.names()):
            self._orders[fused] = parts_of(self._cut, source.config, fused)
        super().__init__(source, {fused: list(orders) for fused, orders in self._orders.items()})
        self.config = {key: value for key, value in source.config.items() if key != CUT}

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.parts:
            return self.source.shape(name)
        plain = next(part for part in self.parts[name] if not groups_of(self._cut, self.config, part))
        return (sum(len(rows) for rows in self._orders[name].values()), *self.source.shape(plain)[1:])

    def read(self, name: str) -> Tensor:
        if name not in self.parts:
            return self.source.read(name)
        orders = self._orders[name].items()
        return whole([(self.source.read(part), rows, groups_of(self._cut, self.config, part)) for part, rows in orders])


def _fused_names(architecture: Architecture, names: list[str]) -> list[str]:
    """Returns the names of the fused weights whose parts are among the names of tensors."""
    ends = tuple(f".{fused}" for fused in architecture.parts)
    of_parts = (name.removesuffix(".weight").rpartition(".")[0] for name in names)
    return [f"{fused}.weight" for fused in dict.fromkeys(of_parts) if fused.endswith(ends)]


def for_drafts(source: Source) -> Source:
    """Returns the source with `kv_b_proj` cut in two if llama.cpp drafts with one of its blocks only then."""
    if (cut := cut_in_two(source)) is source:
        return source
    drafts = further_blocks(architecture_of(cut.config), cut.config["num_hidden_layers"], cut.names())
    return cut if drafts else source


def of_drafting(config: Config) -> Config:
    """Returns config.json of a model as `for_drafts` would have it, if the model has the blocks that it says."""
    config, architecture = normalized(config), find_architecture(config)
    if architecture is None or not architecture.cuttable or not config.get(FURTHER_COUNT):
        return config
    cut = config | {CUT: True}
    return cut if architecture_of(cut).predictor else config


def cut_in_two(source: Source) -> Source:
    """Returns the source with `kv_b_proj` cut in two, where its architecture is `cuttable`."""
    architecture = find_architecture(source.config)
    if architecture is None or not architecture.cuttable:
        return source
    if isinstance(source, HuggingFaceSource):
        return HuggingFaceSource(source.folder, source.name, cut=True)
    return InTwo(source, source.config | {CUT: True})


def cut_like(source: Source, config: Config) -> Source:
    """Returns the source with `kv_b_proj` cut in two, or whole, as a written file with this config has it."""
    if config.get(CUT):
        return cut_in_two(source)
    return InOne(source) if source.config.get(CUT) else source
