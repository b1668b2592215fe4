"""Plans GPTQ targets, writes an artifact as a folder for vLLM, transformers and ExLlamaV2, and reads such a folder.

All linears of the decoder blocks are in one codec of `formats.gptq`; all other tensors are float16. There are two ways
to store zero points, and `checkpoint_format` says which one a folder has:

gptq      zero points less one; ExLlamaV2, vLLM and transformers read it
gptq_v2   zero points unchanged; GPTQModel's own loader needs it for asymmetric models, and vLLM reads it since the end
          of 2025 (earlier versions take it for `gptq` without a warning)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.folders.packed import FolderLayout, OnTensor, entries_of, write_folder
from lqexport.converters.model_tensors import model_tensors
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import is_linear
from lqexport.converters.plan import PLAIN, PlannedTensor, Shapes
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.gptq import BITS, GPTQ, UNIT, Gptq
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.target import Target, unknown

PLANES = ("qweight", "qzeros", "scales", "g_idx")
HINT = (
    "All linears must be in one type of 4 bits whose offsets are whole numbers of scales: quantize again with the "
    "target gptq:4-g128 or gptq:4-g128-sym."
)
ONES = np.int32(0x11111111)
"""A word of eight zero points that are all 1. Adding it overflows none of lqexport's zero points: they are 14 at most.
"""


def plan_gptq(target: Target, config: dict[str, Any], shapes: Shapes) -> list[PlannedTensor]:
    """Returns every tensor of a model in GPTQ's layout, in the order of the model.

    Raises UserError if the target is unknown, if the layout cannot hold a linear, if the model is an encoder or has
    linears in parts or tables of whole numbers, and as `targets.model_tensors` does.
    """
    codec_name = str(target)
    if codec_name not in GPTQ:
        raise UserError(unknown("target", codec_name, GPTQ))
    architecture = architecture_of(config)
    if architecture.encoder:
        raise UserError(
            f"GPTQ's layout is for models that predict tokens, not for {architecture.classes[0]}. "
            "Choose another target."
        )
    if architecture.in_parts:
        raise UserError(
            f"GPTQ's layout of {architecture.classes[0]} is not written: some of its linears are in parts here. "
            "Choose another target."
        )
    if architecture.whole:
        raise UserError(
            f"GPTQ's layout of {architecture.classes[0]} is not written: some of its tensors are tables of whole "
            "numbers, and such a folder holds floats. Choose another target."
        )
    kept = model_tensors(architecture, config, shapes)
    linears = {name: shape for name, shape in kept.items() if is_linear(architecture, name)}
    _check_fits(GPTQ[codec_name], linears)
    return [
        PlannedTensor(name, shape, codec_name if name in linears else PLAIN, name in linears)
        for name, shape in kept.items()
    ]


def _check_fits(wanted: Gptq, linears: Shapes) -> None:
    wrong = [name for name, shape in linears.items() if not _fits(wanted, shape)]
    if not wrong:
        return
    alike = [
        codec for codec in GPTQ.values() if codec.symmetric == wanted.symmetric and codec.reorders == wanted.reorders
    ]
    fitting = [codec.name for codec in alike if all(_fits(codec, shape) for shape in linears.values())]
    advice = f" Take {' or '.join(fitting)}." if fitting else ""
    raise UserError(
        f"{wanted.name} cannot hold {wrong[0]}, {list(linears[wrong[0]])}: rows must be a multiple of {UNIT} and "
        f"columns of {wanted.block}.{advice}"
    )


def _fits(codec: Gptq, shape: tuple[int, ...]) -> bool:
    return shape[0] % UNIT == 0 and shape[1] % codec.block == 0


def write(artifact: Artifact, folder: Path, on_tensor: OnTensor = None, *, v2: bool = False) -> None:
    """Writes a finished artifact as the new folder `folder` (see `packed.write_folder`).

    v2   whether the checkpoint format is `gptq_v2` instead of `gptq`

    Raises UserError if the artifact is unfinished, damaged or not in GPTQ's layout, if the folder exists, or if the
    disk is too small.
    """
    entries = entries_of(artifact, "gptq", "a GPTQ folder", HINT)
    layout = FolderLayout(lambda name, shape: codec_named(name).layout(*shape), _as_v2 if v2 else _as_stored)
    quantization = _quantization(artifact, codec_of_model(artifact), v2)
    config = half_precision(artifact.config()) | {"quantization_config": quantization}
    # AutoGPTQ's readers look for quantize_config.json.
    files = {"config.json": config, "quantize_config.json": quantization}
    write_folder(artifact, folder, entries, layout, files, on_tensor)


def codec_of_model(artifact: Artifact) -> Gptq:
    """Returns the codec of all linears of an artifact in GPTQ's layout."""
    name = next(facts["codec"] for facts in artifact.manifest().values() if facts["codec"] in GPTQ)
    return GPTQ[name]


def half_precision(config: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json with float16 as the model's dtype; with bfloat16, readers would round the scales."""
    return config | {"torch_dtype": "float16", "dtype": "float16"}


def _quantization(artifact: Artifact, codec: Gptq, v2: bool) -> dict[str, Any]:
    run = artifact.run()
    return {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": codec.group or -1,
        "desc_act": codec.reorders,
        "sym": codec.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "damp_percent": run["recipe"]["dampening"],
        "meta": {"quantizer": [f"lqexport:{run['versions']['lqexport']}"]},
    }


def _as_stored(tensor: StoredTensor) -> Planes:
    return tensor.planes


def _as_v2(tensor: StoredTensor) -> Planes:
    return tensor.planes | {"qzeros": tensor.planes["qzeros"] + ONES}


class GptqModel(FolderModel):
    """A model in a folder of GPTQ's layout. Its codec follows from quantization_config."""

    container, reader = "GPTQ folder", "vLLM or ExLlamaV2"
    parts = PLANES

    def packed_shape(self, key: str) -> tuple[int, int]:
        return self.stored.shape(f"{key}.qweight")[-1], self.stored.shape(f"{key}.g_idx")[0]

    def packed_codec(self, key: str) -> str:
        quantization = self.config["quantization_config"]
        settings = tuple(quantization.get(name) for name in ("bits", "group_size", "sym", "desc_act"))
        for codec in GPTQ.values():
            if (BITS, codec.group or -1, codec.symmetric, codec.reorders) == settings:
                return codec.name
        raise ValueError(f"Known are {BITS} bits in groups of 32, 64, 128 or -1, not {quantization}.")

    def packed_planes(self, key: str) -> Planes:
        planes = {plane: self.stored[f"{key}.{plane}"] for plane in PLANES}
        if self.config["quantization_config"].get("checkpoint_format") == "gptq_v2":
            if np.any((planes["qzeros"].view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) % 16 == 0):
                raise UserError(f"{self.folder}: a zero point of {key} is 0, which readers of gptq_v2 do not agree on.")
            planes["qzeros"] = planes["qzeros"] - ONES
        return planes
