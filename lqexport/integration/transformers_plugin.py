"""The plugin with which transformers loads folders of the native format. Importing it registers it.

`lqexport` imports it while transformers itself is being imported (see `lqexport.integration.registration`), so it must
not import transformers' models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lqexport.converters.folders.native import METHOD, VERSION
from lqexport.integration.packed_linear import PackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(METHOD)
class LqexportConfig(QuantizationConfigMixin):
    """The quantization_config of a native folder.

    modules          for each packed linear its codec, shape [rows, columns], and rank if it has a low-rank correction
    low_rank_dtype   the dtype of the low-rank factors: float16 or float32
    version          of the native format

    Raises ValueError for a version that this lqexport does not know.
    """

    def __init__(
        self, modules: dict[str, dict[str, Any]], low_rank_dtype: str | None = None, version: int = VERSION, **_: Any
    ) -> None:
        if version != VERSION:
            raise ValueError(f"The folder is of version {version} of lqexport's format; this lqexport reads {VERSION}.")
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum lists transformers' own
        self.version, self.modules, self.low_rank_dtype = version, modules, low_rank_dtype


@register_quantizer(METHOD)
class LqexportQuantizer(HfQuantizer):
    """Replaces every packed linear by a `PackedLinear` before the weights are loaded."""

    requires_calibration = True
    quantization_config: LqexportConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        dtype = getattr(torch, self.quantization_config.low_rank_dtype or "float16")
        for full_name, entry in self.quantization_config.modules.items():
            name = full_name
            if not _has_module(model, name):  # a model without its head has names without the prefix
                name = name.removeprefix(f"{model.base_model_prefix}.")
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"config.json says that {full_name} is packed, but it is a {type(linear).__name__}.")
            with torch.device("meta"):
                packed = PackedLinear(
                    entry["codec"], linear.out_features, linear.in_features,
                    rank=entry.get("rank", 0), low_rank_dtype=dtype, bias=linear.bias is not None,
                )  # fmt: skip
            # Keeps transformers from filling missing codes with random values: a missing tensor is an error, see below.
            packed._is_hf_initialized = True  # type: ignore[assignment]  # transformers' own mark
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        """Raises ValueError if the files lack a tensor. transformers only warns, and leaves random values in it."""
        tensors = model.state_dict(keep_vars=True)
        # Tensors on "meta" were loaded and are offloaded.
        lost = [
            name
            for name, tensor in tensors.items()
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if lost:
            raise ValueError(f"{len(lost)} tensors are missing from the model's files: {', '.join(lost[:3])}.")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, _plain(module, dtype or torch.float32))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True, since adapters on top of the packed linears can be trained."""
        return True


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _plain(packed: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """Returns an nn.Linear with the decoded weights of a packed linear."""
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
    linear.weight = nn.Parameter(packed.decoded().to(dtype), requires_grad=False)
    if packed.bias is not None:
        linear.bias = packed.bias
    return linear
