"""Native folders as transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqexport.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAFE = {"trust_remote_code": False, "use_safetensors": True}
"""No code from the folder, and no pickled weights, which could hold some."""


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model of a native folder or hub id, its linears packed in memory as they are in the file.

    options   of transformers' `from_pretrained`, such as `device_map="auto"` and `dtype=torch.float16`

    Raises UserError where the folder is no native one, or is damaged.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from lqexport.converters.folders.native import METHOD
    from lqexport.converters.models.architectures import find_architecture

    try:
        known = find_architecture(AutoConfig.from_pretrained(str(folder), trust_remote_code=False).to_dict())
        kind = AutoModel if known and known.encoder else AutoModelForCausalLM
        model = kind.from_pretrained(str(folder), **SAFE | options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).strip()}") from error
    if getattr(model, "quantization_method", None) != METHOD:
        raise UserError(f"{folder} is not of the native format. `lqexport to-native` writes such folders.")
    return model


class LeanQuantModelForCausalLM:
    """The loader of LeanQuant's own package by name and shape, for folders of the native format."""

    @staticmethod
    def from_pretrained(
        base: str | Path, folder: str | Path | None = None, bits: int | None = None, **options: Any
    ) -> PreTrainedModel:
        """`load(folder)`, or `load(base)` where there is no folder: a native folder has the config of its base model.

        base   the model that was quantized; its config.json must be of the folder's architecture
        bits   of the codes, checked where given

        Raises UserError as `load`, and where `base` or `bits` are not the folder's.
        """
        model = load(base if folder is None else folder, **options)
        _check_bits(model, bits)
        if folder is not None:
            from transformers import AutoConfig

            kind = AutoConfig.from_pretrained(str(base), trust_remote_code=False).model_type
            if kind != model.config.model_type:
                raise UserError(f"{folder} is a {model.config.model_type} model, and {base} a {kind} one.")
        return model


def _check_bits(model: PreTrainedModel, bits: int | None) -> None:
    from lqexport.formats.registry import codec_named

    modules = model.config.quantization_config.modules.values()
    found = {int(codec_named(entry["codec"]).bits) for entry in modules}  # type: ignore[union-attr]  # native ones have it
    if bits is not None and bits not in found:
        raise UserError(f"The model is packed in {', '.join(map(str, sorted(found)))} bits, not {bits}.")
