"""Makes transformers models of written files and sources, which generate text and answer tasks as a whole."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lqexport.converters.folders.native import is_native_folder
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.evaluation.logits import check_predicts
from lqexport.integration.loading import load
from lqexport.models.any_model import AnyModel
from lqexport.models.interface import Weights


def runnable(model: AnyModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a transformers model with a model's weights, packed for a native folder and else decoded.

    Raises UserError as `check_runnable` does, and if the weights cannot be read.
    """
    check_runnable(model)
    if is_native_folder(folder := Path(model.name)):
        return load(folder, dtype=dtype, device_map={"": device})
    return _dense(model.weights, device, dtype)


def check_runnable(model: AnyModel) -> None:
    """Raises UserError if `runnable` will make no transformers model of it. No weight is read.

    That is so for an encoder, and where transformers stores a tensor under another name or in another form, such as
    stacked experts.
    """
    check_predicts(architecture_of(model.weights.config))
    if is_native_folder(Path(model.name)):
        return
    names = set(model.weights.names())
    empty = _empty(model.weights, torch.device("meta"), torch.float32)
    if unmatched := [name for name, _ in empty.named_parameters() if name not in names]:
        raise UserError(
            f"transformers keeps {unmatched[0]} in another form than {model.name}, which cannot be run as a whole."
        )


def _empty(weights: Weights, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the transformers model for `weights`, without them."""
    options = {key: value for key, value in weights.config.items() if key != "quantization_config"}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), dtype=dtype)


def _dense(weights: Weights, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a transformers model with the decoded `weights`."""
    model = _empty(weights, device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    return model.eval()
