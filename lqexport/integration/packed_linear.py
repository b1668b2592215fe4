"""A torch linear with packed weights. It uses the CUDA kernels if possible, else it decodes the weights each time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lqexport.converters.folders.native import LOW_RANK
from lqexport.formats.registry import codec_named
from lqexport.kernels import cuda, cuda_decode, native_decode
from lqexport.kernels.cuda_multiply import LowRank, multiply

LEFT, RIGHT = (LOW_RANK[side].removeprefix(".") for side in "BA")


class PackedLinear(nn.Linear):
    """Computes x W^T + bias with W [rows, columns] packed in a native codec.

    x is [..., columns], float32, float16 or bfloat16. The tensors are those of `converters.folders.native`: `weight`
    holds the codes, uint8 [n]. The class is an nn.Linear so that PEFT and other libraries treat it as one. Gradients
    flow to x and the bias, not to W. The tensors keep their dtype under `.half()` and similar calls, since rounding
    them would change W.

    rank             the rank of the low-rank correction; 0 for none
    low_rank_dtype   the dtype of its factors
    """

    def __init__(
        self, codec_name: str, rows: int, columns: int, *, rank: int = 0, low_rank_dtype: torch.dtype = torch.float16,
        bias: bool = False,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.codec_name, self.in_features, self.out_features, self.rank = codec_name, columns, rows, rank
        for plane, (dtype, shape) in codec_named(codec_name).layout(rows, columns).items():
            empty = torch.empty(shape, dtype=getattr(torch, dtype.name))
            if plane == "codes":
                self.weight = nn.Parameter(empty.view(-1), requires_grad=False)
            else:
                self.register_buffer(plane, empty)
        self._planes = [plane for plane in codec_named(codec_name).layout(rows, columns) if plane != "codes"]
        if rank:
            self.register_buffer(LEFT, torch.empty(rows, rank, dtype=low_rank_dtype))
            self.register_buffer(RIGHT, torch.empty(rank, columns, dtype=low_rank_dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows)) if bias else None)

    def planes(self) -> dict[str, Tensor]:
        """Returns the packed planes, as the codec of `formats` defines them."""
        codes = self.weight.view(self.out_features, -1)
        return {"codes": codes} | {plane: getattr(self, plane) for plane in self._planes}

    def low_rank(self) -> LowRank | None:
        """Returns the low-rank correction; None if there is none."""
        return LowRank(getattr(self, LEFT), getattr(self, RIGHT)) if self.rank else None

    @torch.no_grad()
    def decoded(self) -> Tensor:
        """Returns W with its low-rank correction, float32 [rows, columns]."""
        decode = cuda_decode.decode if cuda.usable(self.weight.device) else native_decode.decode
        weights = decode(self.codec_name, self.planes(), self.in_features)
        correction = self.low_rank()
        return weights if correction is None else weights + correction.left.float() @ correction.right.float()

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        rank = f", rank={self.rank}" if self.rank else ""
        return f"{self.in_features}, {self.out_features}, {self.codec_name}{rank}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves tensors to the device that `fn` moves them to, without a change of dtype."""
        return super()._apply(lambda tensor: _moved(tensor, fn(tensor)), recurse)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    return after if after.dtype == before.dtype else before.to(after.device)


class _Product(torch.autograd.Function):
    """Computes x W^T. The backward pass decodes W again, so that a model in training keeps no decoded weights."""

    @staticmethod
    def forward(context: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        context.linear = linear
        if cuda.usable(x.device) and x.dtype in cuda.TYPES:
            flat = x.reshape(-1, linear.in_features)
            y = multiply(flat, linear.codec_name, linear.planes(), linear.low_rank())
            return y.view(*x.shape[:-1], linear.out_features)
        return functional.linear(x, linear.decoded().to(x.dtype))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.linear.decoded().to(gradient.dtype), None
