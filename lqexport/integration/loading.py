"""Loads native folders as transformers models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lqexport.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAFE = {"trust_remote_code": False, "use_safetensors": True}
"""Options against code from the folder: no remote code, and no pickled weights, which could contain code."""


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Loads the model of a native folder or hub id. Its linears stay packed in memory.

    options   options of transformers' `from_pretrained`, such as `device_map="auto"` and `dtype=torch.float16`

    Raises UserError if the folder is not of the native format, or is damaged.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from lqexport.converters.folders.native import METHOD
    from lqexport.converters.models.architectures import find_architecture

    if Path(folder).is_file():
        raise UserError(f"{folder} is a file, and no folder of the native format, which `lqexport to-native` writes.")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False).to_dict()
        if (config.get("quantization_config") or {}).get("quant_method") != METHOD:
            raise UserError(f"{folder} is not of the native format. `lqexport to-native` writes such folders.")
        known = find_architecture(config)
        auto_class = AutoModel if known and known.encoder else AutoModelForCausalLM
        model: PreTrainedModel = auto_class.from_pretrained(str(folder), **SAFE | options)
    except (OSError, ValueError, RuntimeError) as error:
        absent = "" if Path(folder).exists() else "there is no such folder, and as a name on the hub: "
        raise UserError(f"{folder} cannot be loaded: {absent}{str(error).strip()}") from error
    return model


class LeanQuantModelForCausalLM:
    """A loader of native folders with the name and the signature of the loader in LeanQuant's own package."""

    @staticmethod
    def from_pretrained(
        base: str | Path, folder: str | Path | None = None, bits: int | None = None, **options: Any
    ) -> PreTrainedModel:
        """Returns `load(folder)`, or `load(base)` if no folder is given.

        base     the model that was quantized, whose config.json must be of the folder's architecture; without a folder,
                 the native folder itself, since it has the config of its base model
        bits     the bits of the codes; checked if given
        options  as of `load`

        Raises UserError as `load` does, and if `base` or `bits` do not match the folder.
        """
        model = load(base if folder is None else folder, **options)
        _check_bits(model, bits)
        if folder is not None:
            from transformers import AutoConfig

            base_type = AutoConfig.from_pretrained(str(base), trust_remote_code=False).model_type
            if base_type != model.config.model_type:
                raise UserError(f"{folder} is a {model.config.model_type} model, and {base} a {base_type} one.")
        return model


def _check_bits(model: PreTrainedModel, bits: int | None) -> None:
    from lqexport.formats.registry import codec_named

    modules = model.config.quantization_config.modules.values()
    widths = {int(codec_named(entry["codec"]).bits) for entry in modules}  # type: ignore[union-attr]  # native: has bits
    if bits is not None and bits not in widths:
        raise UserError(f"The model is packed in {', '.join(map(str, sorted(widths)))} bits, not {bits}.")
