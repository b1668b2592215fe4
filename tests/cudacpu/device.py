"""A CUDA device that is not there: tensors that say that they are on it, and are computed on by the CPU.

Within `PretendedCuda`, whatever torch is asked to put on a CUDA device becomes a `There`, a tensor of the CPU with
another name for its device. Its results are there too, and an operation that mixes it with tensors of the CPU, as a
real device would not, raises. So a whole run, with real data, shows where a tensor is on the wrong device.

torch sees one such device, with plenty of memory, and its autocast is the CPU's.

What real devices take from the CPU is taken: numbers (tensors without axes), indices in brackets, and copies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


class There(Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = True
    is_cpu = False


MOVING = {Tensor.to, Tensor.cpu, Tensor.cuda}
CROSSING = {Tensor.copy_, Tensor.__getitem__, torch.as_tensor, torch.tensor}
"""What takes tensors of both devices."""
HOOKING = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}


class PretendedCuda(TorchFunctionMode):
    """See above. `products`: dtype and torch's precision of each product of matrices there."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, str]] = []
        self._replaced: list[ExitStack] = []

    def __enter__(self) -> PretendedCuda:
        replaced = ExitStack()
        replaced.enter_context(patch.object(torch, "autocast", _autocast_there))
        replaced.enter_context(patch.object(torch.cuda, "device_count", lambda: 1))
        replaced.enter_context(patch.object(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40)))
        self._replaced.append(replaced)  # hooks enter the mode while it is entered
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._replaced.pop().close()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        there = any(type(tensor) is not Tensor and isinstance(tensor, There) for tensor in _tensors(args, kwargs))
        if func in TO_NUMPY and there:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func in MOVING:
            return _moved(func, *args, **kwargs)
        if func in HOOKING and there:
            return func(args[0], self._hook(args[1]))
        if func is torch._has_compatible_shallow_copy_type:  # asked where a module is moved
            return isinstance(args[0], There) == isinstance(args[1], There)
        if there and func not in CROSSING:
            _check(func, _tensors(args, kwargs))
        kwargs.pop("pin_memory", None)  # for which a CPU build of torch has no memory
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            there, kwargs["device"] = device.type == "cuda", CPU if device.type == "cuda" else device
        if there and func in {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.addmm_}:
            self.products.append((args[0].dtype, torch.get_float32_matmul_precision()))
        if there and func in {torch.as_tensor, torch.tensor}:
            args = tree_map_only(There, _plain, args)
        result = func(*args, **kwargs)
        return _all_there(result) if there else result

    def _hook(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Autograd calls it outside of the mode, with a tensor of the CPU."""

        def called(gradient: Tensor) -> Any:
            with self:
                return hook(_put_there(gradient))

        return called


class _autocast_there(torch.autocast):
    """Of a CUDA device the CPU's, which computes."""

    def __init__(self, device_type: str, *rest: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *rest, **options)


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors among the arguments and in lists and tuples of them."""
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(tuple(value), {})
    return found


def _check(func: Callable, tensors: list[Tensor]) -> None:
    """Raises RuntimeError where a tensor is not on the device, but for numbers."""
    for tensor in tensors:
        if not isinstance(tensor, There) and tensor.ndim:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, cuda:0, but one is on the cpu.")


def _moved(func: Callable, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    if func is not Tensor.to:
        device, dtype = CPU if func is Tensor.cpu else CUDA, None
    elif arguments and isinstance(arguments[0], Tensor):
        device, dtype = arguments[0].device, arguments[0].dtype
    else:
        options.pop("copy", None)
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
    there = isinstance(tensor, There)
    wanted = there if device is None else device.type == "cuda"
    if device is not None and device.type not in ("cpu", "cuda"):  # meta
        return tensor.to(device, dtype)
    dtype = dtype or tensor.dtype
    if wanted == there:
        result = tensor.to(dtype)
        return _put_there(result) if there else result
    result = tensor.to(dtype, copy=True)
    return _put_there(result) if wanted else _plain(result)


def _all_there(result: Any) -> Any:
    return _put_there(result) if isinstance(result, Tensor) else tree_map_only(Tensor, _put_there, result)


def _put_there(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor:
        tensor.__class__ = There
    return tensor


def _plain(tensor: Tensor) -> Tensor:
    """The same data as a tensor of the CPU."""
    return tensor.detach().as_subclass(Tensor) if isinstance(tensor, There) else tensor


def plain(tensor: Tensor) -> Tensor:
    """The memory behind a tensor that is there, for what runs on the device."""
    with torch._C.DisableTorchFunction():
        return _plain(tensor)
