"""The solve path on fake CUDA tensors: a tensor made on the wrong device raises, with no GPU needed.

A CPU build of torch cannot index a fake CUDA tensor with brackets (their C++ code asks for a device guard), so
`Brackets` takes them apart into the operators that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from lqexport import solve
from lqexport.blocks import BlockModel
from lqexport.fit import fit, minmax
from lqexport.formats.registry import codec
from lqexport.moments import SecondMoments, importance
from lqexport.pipeline import _moments_of
from lqexport.source import open_source

CUDA = torch.device("cuda")
GRIDS = ["gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q4_0", "gguf:Q4_1", "gguf:IQ4_XS", "native:affine-3-g64"]

aten = torch.ops.aten


class Brackets(TorchFunctionMode):
    """`tensor[...]` and `tensor[...] = value` by operators."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__getitem__:
            return view(*args)
        if func is Tensor.__setitem__:
            return assign(*args)
        return func(*args, **(kwargs or {}))


def view(tensor: Tensor, index: Any) -> Tensor:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
        where = items.index(Ellipsis)
        taken = sum(item is not None for item in items) - 1
        items[where : where + 1] = [slice(None)] * (tensor.ndim - taken)
    axis = 0
    for item in items:
        if item is None:
            tensor, axis = aten.unsqueeze(tensor, axis), axis + 1
        elif isinstance(item, slice):
            tensor, axis = aten.slice(tensor, axis, item.start, item.stop, item.step or 1), axis + 1
        elif isinstance(item, Tensor):
            tensor, axis = aten.index_select(tensor, axis, item.to(torch.int64)), axis + 1
        else:
            tensor = aten.select(tensor, axis, item)
    return tensor


def assign(tensor: Tensor, index: Any, value: Any) -> None:
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, Tensor) for item in items):
        aten.index_put_(tensor, [item if isinstance(item, Tensor) else None for item in items], value)
    elif isinstance(value, Tensor):
        view(tensor, index).copy_(value)
    else:
        view(tensor, index).fill_(value)


@contextmanager
def fake() -> Iterator[None]:
    with FakeTensorMode(), Brackets(), torch.no_grad():
        yield


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("base", ["diagonal", "cholesky", "inverse"])
def test_the_solve_path_stays_on_the_device(name: str, base: str) -> None:
    with fake():
        weights = torch.randn(8, 256, device=CUDA)
        moments = SecondMoments(256, "normalized", CUDA)
        moments.add(torch.randn(2, 16, 256, device=CUDA))
        hessian = moments.hessian()
        factor = solve.factorize(hessian.double(), 0.05, True)
        weight = importance(hessian, factor, base, 1.0)
        assert minmax(codec(name), weights).levels.device.type == "cuda"
        grid = fit(codec(name), weights, weight)
        codes = solve.feedback(weights, grid, factor)
        grid, codes = solve.refine(weights, solve.damped(hessian, 0.05), grid, codes, sweeps=1, refit=True)
        values = grid.values(codes)
        assert values.device.type == "cuda"
        assert values.shape == weights.shape
        assert grid.nearest(weights).device.type == "cuda"


def test_a_wrong_device_would_be_seen() -> None:
    with fake(), pytest.raises(RuntimeError, match="device"):
        solve.damped(torch.eye(4, device=CUDA), 0.1) + torch.eye(4)


def test_calibration_stays_on_the_device(tiny_model: Path) -> None:
    source = open_source(str(tiny_model))
    shapes = {name: source.shape(name) for name in source.names()}

    class Fake:
        """The source's shapes, with weights that have no data."""

        config = source.config

        def names(self) -> list[str]:
            return list(shapes)

        def shape(self, name: str) -> tuple[int, ...]:
            return shapes[name]

        def read(self, name: str) -> torch.Tensor:
            return torch.empty(shapes[name])

    with fake():
        model = BlockModel(Fake(), CUDA)
        hidden = model.start(torch.zeros(2, 16, dtype=torch.int64))
        block = model.block(0)
        columns = []
        with _moments_of(block, list(model.architecture.linears), lambda n: SecondMoments(n, "plain", CUDA)) as moments:
            hidden = model.run(block, hidden)
        for total in moments.values():
            assert total.hessian().device.type == "cuda"
            columns.append(total.hessian().shape[0])
        assert columns == [256, 256, 256, 512]
        assert model.logits(hidden).device.type == "cuda"
