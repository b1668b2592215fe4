"""The solve path on fake CUDA tensors: a tensor made on the wrong device raises, with no GPU needed.

In a CPU build of torch, brackets and some methods of a fake CUDA tensor ask for a device guard that is not there, so
`Operators` calls the operators that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from lqexport import solve
from lqexport.blocks import BlockModel
from lqexport.collect import moments_of
from lqexport.fit import fit, minmax
from lqexport.fit_sections import fit_sections, minmax_sections
from lqexport.formats.registry import codec
from lqexport.kernels import cuda
from lqexport.moments import SecondMoments, importance
from lqexport.recipe import ImportanceBase
from lqexport.solve_sections import refine_sections
from lqexport.source import open_source

CUDA = torch.device("cuda")
GRIDS = ["gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K", "gguf:Q4_0", "gguf:Q4_1", "gguf:IQ4_XS", "native:affine-3-g64"]

aten = torch.ops.aten


class Operators(TorchFunctionMode):
    """Such methods by operators."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        replaced = {
            Tensor.__getitem__: view,
            Tensor.__setitem__: assign,
            Tensor.contiguous: aten.contiguous,
            Tensor.to: moved,
        }
        return replaced.get(func, func)(*args, **(kwargs or {}))


def moved(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
    return aten._to_copy(tensor, device=device, dtype=dtype)


def view(tensor: Tensor, index: Any) -> Tensor:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, Tensor)]:
        where = items.index(Ellipsis)
        taken = sum(item is not None for item in items) - 1
        items[where : where + 1] = [slice(None)] * (tensor.ndim - taken)
    gathered: list[Tensor | None] = []  # an index tensor, or None, for each axis that is left
    for item in items:
        axis = len(gathered)
        if isinstance(item, int):
            tensor = aten.select(tensor, axis, item)
            continue
        if item is None:
            tensor = aten.unsqueeze(tensor, axis)
        elif isinstance(item, slice):
            tensor = aten.slice(tensor, axis, item.start, item.stop, item.step or 1)
        gathered.append(item if isinstance(item, Tensor) else None)
    return aten.index(tensor, gathered) if any(index is not None for index in gathered) else tensor


def assign(tensor: Tensor, index: Any, value: Any) -> None:
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, Tensor) for item in items):
        aten.index_put_(tensor, [item if isinstance(item, Tensor) else None for item in items], value)
    elif isinstance(value, Tensor):
        aten.copy_(view(tensor, index), value)
    else:
        aten.fill_(view(tensor, index), value)


class OneFakeMode(FakeTensorMode):
    """Not copied with a tensor that is copied: tensors of two modes do not mix."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OneFakeMode:
        return self


@contextmanager
def fake() -> Iterator[None]:
    with OneFakeMode(), Operators(), torch.no_grad():
        yield


def hessian_and_factor() -> tuple[Tensor, solve.Factor]:
    moments = SecondMoments(256, "normalized", CUDA)
    moments.add(torch.randn(2, 16, 256, device=CUDA))
    return moments.hessian(), solve.factorize(moments.hessian().double(), 0.05, True)


@pytest.mark.parametrize("base", get_args(ImportanceBase))
def test_importance_stays_on_the_device(base: ImportanceBase) -> None:
    with fake():
        assert importance(*hessian_and_factor(), base, 1.0).device.type == "cuda"


@pytest.mark.parametrize("name", GRIDS)
def test_the_solve_path_stays_on_the_device(name: str) -> None:
    with fake():
        weights = torch.randn(8, 256, device=CUDA)
        hessian, factor = hessian_and_factor()
        weight = importance(hessian, factor, "diagonal", 1.0)
        assert minmax(codec(name), weights).levels.device.type == "cuda"
        grid = fit(codec(name), weights, weight)
        codes = solve.feedback(weights, grid, factor)
        grid, codes = solve.refine(weights, solve.damped(hessian, 0.05), grid, codes, sweeps=1, refit=True)
        values = grid.values(codes)
        assert values.device.type == "cuda"
        assert values.shape == weights.shape
        assert grid.nearest(weights).device.type == "cuda"


def test_exl2s_solve_path_stays_on_the_device() -> None:
    with fake():
        weights = torch.randn(64, 256, device=CUDA)
        hessian, factor = hessian_and_factor()
        kind = codec("exl2:8g32x1+4g64x2+3g96x1")
        assert minmax_sections(kind, weights, factor.order).sections[0].maxima.device.type == "cuda"
        grid = fit_sections(kind, weights, importance(hessian, factor, "diagonal", 1.0), factor.order)
        codes = solve.feedback(weights, grid, factor)
        grid, codes = refine_sections(weights, solve.damped(hessian, 0.05), grid, codes, sweeps=1)
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
        with moments_of(block, list(model.architecture.linears), lambda n: SecondMoments(n, "plain", CUDA)) as moments:
            hidden = model.run(block, hidden)
        for total in moments.values():
            assert total.hessian().device.type == "cuda"
            columns.append(total.hessian().shape[0])
        assert columns == [256, 256, 256, 512]
        assert model.logits(hidden).device.type == "cuda"


@pytest.mark.parametrize("name", GRIDS)
def test_the_kernels_get_tensors_of_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path with the CUDA kernels: of another device they would fail, with other strides read wrongly."""
    launched = []

    def launch(source: str, kernel: str, blocks: int, threads: int, arguments: list[Any]) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        assert all(tensor.device.type == "cuda" and tensor.is_contiguous() for tensor in tensors)
        launched.append(kernel)

    monkeypatch.setattr(cuda, "usable", lambda device: device.type == "cuda")
    monkeypatch.setattr(cuda, "launch", launch)
    with fake():
        weights = torch.randn(8, 256, device=CUDA)
        hessian, factor = hessian_and_factor()
        grid = fit(codec(name), weights, importance(hessian, factor, "diagonal", 1.0))
        codes = solve.feedback(weights, grid, factor)
        solve.refine(weights, solve.damped(hessian, 0.05), grid, codes, sweeps=1, refit=True)
    assert set(launched) == {"fit_groups", "feedback_block", "refine_block"}
