"""Runs ExLlamaV3's own Python code on the CPU, with functions of torch in place of its compiled extension.

ExLlamaV3's loader finds the tensors of a folder by its own names, checks their dtypes and shapes, and builds its own
modules; these compute in their own order. Only the kernels are replaced, each by a few lines that say what it computes.
What the kernels themselves do cannot be checked so.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from torch.nn import functional

EXTENSION = "exllamav3_ext"
GPTJ = 1
"""ExLlamaV3's number of the rotation of neighbouring columns; the other one rotates the halves of a head."""


def is_installed() -> bool:
    """Whether ExLlamaV3's Python code is there. Its wheel needs torch, and is installed without a GPU."""
    return all(importlib.util.find_spec(name) for name in ("exllamav3", "marisa_trie", "llguidance"))


class Extension(ModuleType):
    """The module in the place of the compiled one. A kernel that is not replaced says its name when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("BC_"):
            return lambda *arguments, **options: None
        if name.startswith("HAS_"):
            return False

        def missing(*arguments: object, **options: object) -> None:
            raise NotImplementedError(f"ExLlamaV3's kernel {name} has no replacement.")

        return missing


def install() -> None:
    """Puts the replacements in place, before ExLlamaV3 is imported."""
    if EXTENSION in sys.modules:
        return
    extension = Extension(EXTENSION)
    origin = f"{EXTENSION}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    loader = importlib.machinery.ExtensionFileLoader(EXTENSION, origin)
    extension.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, loader, origin=origin)
    for function in (
        rms_norm, rms_norm_res_in, rope, hgemm, silu_mul, gelu_mul, relu2_mul, silu_oai_mul, softcap, mul_sigmoid_,
        routing_std,
        routing_ds3_nogroup, routing_ds3_group, index_add_,
    ):  # fmt: skip
        setattr(extension, function.__name__, function)
    extension.BC_LinearEXL3 = LinearKernel  # type: ignore[attr-defined]
    sys.modules[EXTENSION] = extension
    if importlib.util.find_spec("triton") is None:
        triton = MagicMock()
        triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
        triton.jit = lambda function=None, **options: function or (lambda kernel: kernel)
        sys.modules |= {"triton": triton, "triton.language": triton.language}


def _normed(
    x: Tensor, weight: Tensor | None, epsilon: float, bias: float, scale: float, wide: bool, groups: int = 1
) -> Tensor:
    dims = (-1, -2) if wide else (-1,)
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(dims, keepdim=True) + epsilon) * scale
    if weight is None:
        return values
    factor = weight.float() + bias
    return values * (factor.reshape(values.shape[-2:]) if wide else factor)


def rms_norm(
    x: Tensor, weight: Tensor | None, y: Tensor, epsilon: float, bias: float, scale: float, wide: bool,
    residual: bool = False, groups: int = 1,
) -> None:  # fmt: skip
    """y = norm(x), or y + norm(x); `wide` norms all heads of a token together."""
    assert groups == 1
    normed = _normed(x, weight, epsilon, bias, scale, wide)
    y.copy_(y.float() + normed if residual else normed)


def rms_norm_res_in(
    x: Tensor, weight: Tensor, y: Tensor, residual: Tensor, epsilon: float, bias: float, scale: float
) -> None:
    """residual += x; y = norm(residual)."""
    residual += x
    y.copy_(_normed(residual, weight, epsilon, bias, scale, False))


def rope(
    q: Tensor, out_q: Tensor, k: Tensor | None, out_k: Tensor | None, inv_freq: Tensor, position: int,
    positions: Tensor | None, position_ids: Tensor | None, style: int, factor: float, q_norm: Tensor | None,
    k_norm: Tensor | None, epsilon: float, bias: float, beta: float, original: int, *more: object,
) -> None:  # fmt: skip
    """Norms each head and rotates it; [batch, tokens, heads, columns]."""
    assert positions is None
    assert position_ids is None
    at = torch.arange(position, position + q.shape[1], dtype=torch.float32)
    angles = (at[:, None] * inv_freq.float())[None, :, None]
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    for x, out, norm in ((q, out_q, q_norm), (k, out_k, k_norm)):
        if x is None or out is None:
            continue
        values = x.float() if norm is None else _normed(x, norm, epsilon, bias, 1.0, False).half().float()
        rotated, rest = values.split([2 * inv_freq.numel(), values.shape[-1] - 2 * inv_freq.numel()], -1)
        if style == GPTJ:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
            pairs = torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1).flatten(-2)
        else:
            first, second = rotated.chunk(2, -1)
            pairs = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
        result = torch.cat([pairs, rest], -1)
        if beta and x is q:
            result = result * (1 + beta * torch.log(1 + torch.floor(at / original)))[None, :, None, None]
        out.copy_(result)


def hgemm(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """y = x weight, for halves."""
    y.copy_(x.float() @ weight.float())


def _multiplied(activation: Any) -> Any:
    def multiply(x: Tensor, y: Tensor, z: Tensor, limit: float) -> None:
        assert limit == 0
        z.copy_(activation(x.float()) * y.float())

    return multiply


silu_mul = _multiplied(functional.silu)
gelu_mul = _multiplied(lambda x: functional.gelu(x, approximate="tanh"))
relu2_mul = _multiplied(lambda x: functional.relu(x).square())
silu_mul.__name__, gelu_mul.__name__, relu2_mul.__name__ = "silu_mul", "gelu_mul", "relu2_mul"


def silu_oai_mul(gate: Tensor, up: Tensor, result: Tensor, limit: float) -> None:
    """gpt-oss's product of gate and up, cut off at a limit."""
    gates, ups = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    result.copy_(gates * torch.sigmoid(1.702 * gates) * (ups + 1))


def softcap(x: Tensor, y: Tensor, most: float) -> None:
    """y = most tanh(x / most)."""
    y.copy_(most * torch.tanh(x.float() / most))


def mul_sigmoid_(x: Tensor, gate: Tensor) -> None:
    """x *= sigmoid(gate)."""
    x.copy_(x.float() * torch.sigmoid(gate.float()).view_as(x))


def routing_std(
    x: Tensor, gate: Tensor, logits: Tensor, chosen: Tensor, weights: Tensor, scale: Tensor | None, transposed: Tensor,
    bias: Tensor | None, *more: object,
) -> None:  # fmt: skip
    """Chooses the experts of largest logits; their weights are a softmax among them."""
    values = x.float() @ gate.float() + (0 if bias is None else bias.float())
    best, numbers = values.topk(chosen.shape[-1])
    chosen.copy_(numbers)
    weights.copy_(best.softmax(-1) * (1 if scale is None else scale.float()[numbers]))


def _weighed(scores: Tensor, choice: Tensor, chosen: Tensor, weights: Tensor, scale: float) -> None:
    numbers = choice.topk(chosen.shape[-1]).indices
    best = scores.gather(-1, numbers)
    chosen.copy_(numbers)
    weights.copy_(best / (best.sum(-1, keepdim=True) + 1e-20) * scale)


def routing_ds3_nogroup(
    x: Tensor, gate: Tensor, logits: Tensor, bias: Tensor | None, chosen: Tensor, weights: Tensor, scale: float,
    *more: object,
) -> None:  # fmt: skip
    """Chooses the experts of largest sigmoid and bias; their weights are shares of the sigmoids."""
    scores = (x.float() @ gate.float()).sigmoid()
    _weighed(scores, scores + (0 if bias is None else bias.float()), chosen, weights, scale)


def routing_ds3_group(
    logits: Tensor, bias: Tensor | None, chosen: Tensor, weights: Tensor, scale: float, activation: int, groups: int,
    best_groups: int,
) -> None:  # fmt: skip
    """Chooses experts as `routing_ds3_nogroup` does, among the groups whose two best experts have the largest sum."""
    scores = logits.float().sigmoid()
    choice = scores + (0 if bias is None else bias.float())
    grouped = choice.unflatten(-1, (groups, -1))
    sums = grouped.topk(2).values.sum(-1)
    outside = torch.ones_like(sums, dtype=torch.bool).scatter(-1, sums.topk(best_groups).indices, False)
    _weighed(scores, grouped.masked_fill(outside[..., None], float("-inf")).flatten(-2), chosen, weights, scale)


def index_add_(total: Tensor, rows: Tensor, values: Tensor, *more: object) -> None:
    """total[rows] += values."""
    total.index_add_(0, rows, values.to(total.dtype))


class LinearKernel:
    """Multiplies by an EXL3 linear, whose weights this program decodes."""

    def __init__(
        self, trellis: Tensor, suh: Tensor, svh: Tensor, bits: float, bias: Tensor | None, mcg: Tensor | None,
        mul1: Tensor | None, scratch: Tensor | None,
    ) -> None:  # fmt: skip
        self.stored = {"trellis": trellis, "suh": suh, "svh": svh}
        self.bits, self.bias = bits, bias
        self.codebook = "mul1" if mul1 is not None else "mcg" if mcg is not None else "3inst"

    def run_alloc(self, x: Tensor, columns: int, as_float: bool) -> Tensor:
        from lqexport.formats.registry import codec_named

        name = f"exl3:{self.bits}{'' if self.codebook == 'mul1' else f'-{self.codebook}'}"
        planes = {plane: tensor.numpy() for plane, tensor in self.stored.items()}
        weight = torch.from_numpy(codec_named(name).decode(planes, x.shape[-1]))
        y = x.float() @ weight[:columns].T
        if self.bias is not None:
            y += self.bias.float()
        return y if as_float else y.half()


def _attention(arguments: Any) -> Tensor | None:
    """Attention of all heads in float32, with ExLlamaV3's window: a token sees `window_size` tokens before it."""
    q, k, v = (tensor.float().transpose(1, 2) for tensor in (arguments.q, arguments.k, arguments.v))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * arguments.sm_scale
    if arguments.softcap:
        scores = arguments.softcap * torch.tanh(scores / arguments.softcap)
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    hidden = distance < 0
    if arguments.window_size is not None and arguments.window_size >= 0:
        hidden |= distance > arguments.window_size
    scores = scores.masked_fill(hidden, float("-inf"))
    if arguments.sinks is not None:
        sinks = arguments.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2).contiguous().to(arguments.q.dtype)


def _prefill(
    q: Tensor, *caches: None, causal: bool, softmax_scale: float, window_size: tuple[int, int], softcap: float,
    sinks: Tensor | None, k_new: Tensor, v_new: Tensor,
) -> Tensor | None:  # fmt: skip
    """The attention of blocks that keep no more than one window."""
    assert causal
    return _attention(
        SimpleNamespace(
            q=q,
            k=k_new,
            v=v_new,
            sm_scale=softmax_scale or q.shape[-1] ** -0.5,
            softcap=softcap,
            sinks=sinks,
            window_size=window_size[0],
        )
    )


def load(folder: Path) -> Any:
    """Returns ExLlamaV3's model of a folder, loaded by its own loader on the CPU."""
    install()
    from exllamav3.model.config import Config
    from exllamav3.model.model import Model
    from exllamav3.modules import sliding_attn
    from exllamav3.modules.attention_fn import dispatch

    dispatch.attn_fns[:] = [_attention]
    sliding_attn.paged_attn_triton_prefill = _prefill
    config = Config.from_directory(str(folder), load_method="python")
    config.infer_params.no_reconstruct = True  # one linear after the other
    model = Model.from_config(config)
    for module in model.modules:
        module.load(torch.device("cpu"))
    for module in model:
        if type(module).__name__ == "BlockSparseMLP":  # which finishes this on a GPU alone
            module.load_local()
            module.load_routing()
    return model


def logits(model: Any, tokens: list[int]) -> Tensor:
    """Returns the logits of all positions, float32 [tokens, vocabulary, padded to 128 where the output is EXL3]."""
    parameters: dict[str, Any] = {"attn_mode": "flash_attn_nc"}
    x = model.prepare_inputs(torch.tensor([tokens]), parameters)
    return model.forward_ls(x, parameters)[0].float()
