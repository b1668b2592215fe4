"""A pretended CUDA device: its tensors say that they are on the device, and the CPU computes with them.

Within `PretendedCuda`, everything that torch is asked to put on a CUDA device becomes a `PretendedTensor`, which is a
CPU tensor that reports another device. Results computed from it are on the device too. An operation that mixes it with
CPU tensors raises, as on a real device. So a whole run with real data shows whether a tensor is on the wrong device.

torch sees one such device, with plenty of memory. Its autocast is the CPU's.

Real devices accept some CPU tensors, and so does this one: numbers (tensors without axes), indices in brackets, and
copies.
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


class PretendedTensor(Tensor):
    """A tensor on the pretended device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = True
    is_cpu = False


MOVING = {Tensor.to, Tensor.cpu, Tensor.cuda}
"""Functions that move a tensor between devices."""
CROSSING = {Tensor.copy_, Tensor.__getitem__, torch.as_tensor, torch.tensor}
"""Functions that accept tensors of both devices."""
HOOKING = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook}
"""Functions that give autograd a hook."""
TO_NUMPY = {Tensor.numpy, Tensor.__array__}
"""Functions that need a tensor on the CPU."""


class PretendedCuda(TorchFunctionMode):
    """The mode in which torch sees the pretended device.

    products   dtype, and torch's setting of float32 precision, of each matrix product on the device
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, str]] = []
        self._replaced: list[ExitStack] = []

    def __enter__(self) -> PretendedCuda:
        replaced = ExitStack()
        replaced.enter_context(patch.object(torch, "autocast", _autocast_on_cpu))
        replaced.enter_context(patch.object(torch.cuda, "device_count", lambda: 1))
        replaced.enter_context(patch.object(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40)))
        self._replaced.append(replaced)  # a stack, since hooks enter the mode again while it is active
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._replaced.pop().close()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        on_cuda = any(
            type(tensor) is not Tensor and isinstance(tensor, PretendedTensor) for tensor in _tensors(args, kwargs)
        )
        if func in TO_NUMPY and on_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func in MOVING:
            return _moved(func, *args, **kwargs)
        if func in HOOKING and on_cuda:
            return func(args[0], self._hook(args[1]))
        if func is torch._has_compatible_shallow_copy_type:  # torch asks this when it moves a module
            return isinstance(args[0], PretendedTensor) == isinstance(args[1], PretendedTensor)
        if on_cuda and func not in CROSSING:
            _check(func, _tensors(args, kwargs))
        kwargs.pop("pin_memory", None)  # a CPU build of torch has no pinned memory
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            on_cuda, kwargs["device"] = device.type == "cuda", CPU if device.type == "cuda" else device
        if on_cuda and func in {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.addmm_}:
            self.products.append((args[0].dtype, torch.get_float32_matmul_precision()))
        if on_cuda and func in {torch.as_tensor, torch.tensor}:
            args = tree_map_only(PretendedTensor, _plain, args)
        result = func(*args, **kwargs)
        return _all_on_cuda(result) if on_cuda else result

    def _hook(self, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Returns a hook that enters the mode and gets a pretended tensor.

        Autograd calls hooks outside the mode, with a CPU tensor.
        """

        def called(gradient: Tensor) -> Any:
            with self:
                return hook(_on_cuda(gradient))

        return called


class _autocast_on_cpu(torch.autocast):
    """torch.autocast, with the CPU's in the place of a CUDA device's, since the CPU computes."""

    def __init__(self, device_type: str, *rest: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *rest, **options)


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """Returns the tensors among the arguments, and in lists and tuples among them."""
    tensors = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _tensors(tuple(value), {})
    return tensors


def _check(func: Callable, tensors: list[Tensor]) -> None:
    """Raises RuntimeError if a tensor with axes is not on the device."""
    for tensor in tensors:
        if not isinstance(tensor, PretendedTensor) and tensor.ndim:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, cuda:0, but one is on the cpu.")


def _moved(func: Callable, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Returns the result of a function of MOVING: the tensor on the device, and in the dtype, that is asked for."""
    if func is not Tensor.to:
        device, dtype = CPU if func is Tensor.cpu else CUDA, None
    elif arguments and isinstance(arguments[0], Tensor):
        device, dtype = arguments[0].device, arguments[0].dtype
    else:
        options.pop("copy", None)
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
    on_cuda = isinstance(tensor, PretendedTensor)
    to_cuda = on_cuda if device is None else device.type == "cuda"
    if device is not None and device.type not in ("cpu", "cuda"):  # meta
        return tensor.to(device, dtype)
    dtype = dtype or tensor.dtype
    if to_cuda == on_cuda:
        result = tensor.to(dtype)
        return _on_cuda(result) if on_cuda else result
    result = tensor.to(dtype, copy=True)
    return _on_cuda(result) if to_cuda else _plain(result)


def _all_on_cuda(result: Any) -> Any:
    """Puts a result, or all tensors in a nested result, on the pretended device."""
    return _on_cuda(result) if isinstance(result, Tensor) else tree_map_only(Tensor, _on_cuda, result)


def _on_cuda(tensor: Tensor) -> Tensor:
    """Makes a CPU tensor a pretended one, in place, and returns it. Parameters stay as they are."""
    if type(tensor) is Tensor:
        tensor.__class__ = PretendedTensor
    return tensor


def _plain(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor on the same memory."""
    return tensor.detach().as_subclass(Tensor) if isinstance(tensor, PretendedTensor) else tensor


def plain(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor on the memory of a pretended tensor, for kernels that run on the device."""
    with torch._C.DisableTorchFunction():
        return _plain(tensor)
