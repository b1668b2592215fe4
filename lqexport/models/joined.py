"""Sources with linears that GGUF files hold joined, in blocks that predict further tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import block_module
from lqexport.models.source import Source
from lqexport.models.source_view import SourceView
from lqexport.storage.background import FileSpan


class Joined(SourceView):
    """A source with `joins` of its architecture as one tensor each.

    parts   joined tensor -> the tensors of the source whose rows it has
    """

    def __init__(self, source: Source, parts: dict[str, list[str]]) -> None:
        super().__init__(source)
        self.parts = parts

    def moves(self, name: str) -> bool:
        """Returns whether a tensor is a joined one."""
        return name in self.parts

    def names(self) -> list[str]:
        within = {part for parts in self.parts.values() for part in parts}
        return [*(name for name in self.source.names() if name not in within), *self.parts]

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self.source.shape(part) for part in self.parts.get(name, [name])]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def read(self, name: str) -> Tensor:
        if name not in self.parts:
            return self.source.read(name)
        return torch.cat([self.source.read(part) for part in self.parts[name]])

    def file_spans(self, name: str) -> list[FileSpan]:
        spans_of = super().file_spans
        return [span for part in self.parts.get(name, [name]) for span in spans_of(part)]


def joined(source: Source) -> Source:
    """Returns the source with the linears joined that GGUF files hold as one."""
    architecture = architecture_of(source.config)
    parts = _parts(architecture, source.names()) if architecture.joins else {}
    return Joined(source, parts) if parts else source


def _parts(architecture: Architecture, names: list[str]) -> dict[str, list[str]]:
    """Returns joined tensor -> the tensors whose rows it has, where all of them are there."""
    present = set(names)
    parts: dict[str, list[str]] = {}
    for name in names:
        layer, module, end = block_module(architecture, name) or (-1, "", "")
        for whole, linears in architecture.joins.items():
            if architecture.predicts(layer) and module == linears[0] and end == "weight":
                prefix = name.removesuffix(f"{module}.{end}")
                of_whole = [f"{prefix}{linear}.{end}" for linear in linears]
                parts |= {f"{prefix}{whole}.{end}": of_whole} if present.issuperset(of_whole) else {}
    return parts
