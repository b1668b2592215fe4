"""Tensors of safetensors files that are stored as floats, as planes of their codecs."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.converters.plan import PLAIN
from lqexport.formats.codec import Planes

PLAIN_CODECS = {torch.float16: PLAIN, torch.bfloat16: "gguf:BF16", torch.float32: "gguf:F32"}
"""Dtype of a tensor that is not quantized -> its codec."""


def plain_planes(tensor: Tensor) -> Planes:
    """Returns the planes of a contiguous tensor of floats with one or two dimensions."""
    matrix = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor
    return {"blocks": matrix.view(torch.uint8).numpy()}
