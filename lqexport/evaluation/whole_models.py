"""Makes transformers models of written files and other weights, which generate text and answer tasks as a whole."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.evaluation.logits import check_predicts
from lqexport.integration.loading import load
from lqexport.models.adapters import corrected, open_factors
from lqexport.models.interface import Weights
from lqexport.models.written import NativeFolder, open_export


def runnable(path: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a transformers model with the file's weights, packed for a native folder and else decoded.

    Low-rank corrections are added. Raises UserError if the file cannot be read, and for an encoder.
    """
    export = open_export(path)
    check_predicts(architecture_of(export.config))
    if isinstance(export, NativeFolder):
        return load(path, dtype=dtype, device_map={"": device})
    factors = open_factors(path, None, export.config)
    return dense(corrected(export, factors), device, dtype)


def dense(weights: Weights, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a transformers model with the decoded `weights`.

    Raises UserError if transformers stores a tensor under another name or in another form, such as stacked experts.
    """
    options = {key: value for key, value in weights.config.items() if key != "quantization_config"}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options), dtype=dtype)
    names = set(weights.names())
    if unmatched := [name for name, _ in model.named_parameters() if name not in names]:
        raise UserError(
            f"transformers keeps {unmatched[0]} in another form than the file, so tasks cannot be run on it."
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    return model.eval()
