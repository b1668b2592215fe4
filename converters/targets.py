"""Plans GGUF and native targets: chooses the codec of every tensor of a model.

    gguf:TYPE       every linear of the decoder blocks in one GGUF type; embedding and output in Q8_0 (for F32, F16 and
                    BF16: in that type); norms and biases in F32
    gguf:MIX        llama.cpp's mixes, which give each tensor its type by llama.cpp's rules: Q3_K_S/M/L, Q4_K_S/M,
                    Q5_K_S/M, Q2_K_S, IQ2_M, IQ3_XS, IQ3_M, MXFP4_MOE, and those that llama.cpp calls as a type:
                    Q2_K_M, Q6_K_M, and IQ2_XXS_MIX or TQ1_0_MIX, with _MIX, for the others
    gguf:auto       the types that the caller gives (`lqexport.pipeline.types_by_size` chooses them), else Q8_0
    native:CODEC    every linear in a native codec; embedding and output in F16; norms and biases in F32

`embedding_type` and `output_type` replace the target's types for these two tensors. If a model's output is tied to its
embedding, there is only the embedding, and either option sets its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from lqexport.converters.gguf.metadata import check_metadata
from lqexport.converters.gguf.mix_plan import mix_types
from lqexport.converters.gguf.mixes import MIXES, fallback_type
from lqexport.converters.model_tensors import block_count, model_tensors
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.further import further_blocks, is_further_matrix
from lqexport.converters.models.tensor_names import gguf_names, is_linear, is_rounded, is_tied, plain_codec
from lqexport.converters.plan import PlannedTensor, Shapes, check_names, matches, refuse_fallbacks
from lqexport.errors import UserError, listed
from lqexport.formats.codec import PlainCodec
from lqexport.formats.exl3 import EXL3
from lqexport.formats.gptq import GPTQ
from lqexport.formats.registry import codec_named, names
from lqexport.target import AUTO, Target, full_name, unknown


def targets() -> list[str]:
    """Returns the names of all targets that `plan` knows, except `gguf:auto`."""
    return [*names("gguf"), *(f"gguf:{mix}" for mix in MIXES), *names("native")]


def plan(
    target: Target,
    config: dict[str, Any],
    shapes: Shapes,
    *,
    embedding_type: str | None = None,
    output_type: str | None = None,
    types: Mapping[str, str] = MappingProxyType({}),
    fallback: bool = True,
    further: bool = True,
) -> list[PlannedTensor]:
    """Returns the codec of every tensor in the model's order: embedding, blocks in data-flow order, norm, output.

    config           content of config.json
    shapes           name -> shape of the checkpoint's tensors
    embedding_type   type of the embedding, instead of the target's
    output_type      type of the output, instead of the target's
    types            shell pattern -> codec name of the matrices whose names match it; the last match counts
    fallback         whether a tensor whose shape a type cannot hold may take another type, as in llama.cpp
    further          whether blocks that predict further tokens are kept, where llama.cpp has them

    Raises UserError if the target, a type, the architecture or a tensor is unknown, if a tensor is missing, if shapes
    do not fit config.json, or if a tensor would fall back and `fallback` is false.
    """
    config = normalized(config)
    architecture = architecture_of(config)
    kept = model_tensors(architecture, config, shapes, further=further and target.family == "gguf")
    _check_target(target)
    _check_format(target, architecture, config, kept)
    overrides = _overrides(architecture, config, embedding_type, output_type)
    _check_types(types, kept)
    mix = _mix(target, architecture, config, kept)
    planned = []
    for name, shape in kept.items():
        matching = [codec_name for pattern, codec_name in types.items() if matches(pattern, name, shape)]
        wanted = matching[-1] if matching else overrides.get(name) or _wanted(target, architecture, mix, name)
        planned.append(_fitted(architecture, name, shape, wanted))
    if not fallback:
        refuse_fallbacks(target, planned)
    if target.family == "gguf":
        blocks = block_count(config) + further_blocks(architecture, block_count(config), shapes)
        _check_experts(planned, gguf_names(architecture, blocks))
    return planned


def _check_format(target: Target, architecture: Architecture, config: dict[str, Any], kept: Shapes) -> None:
    """Raises UserError if the target's format has no place for a setting or a tensor, or lacks one that it needs."""
    if target.family == "gguf":
        check_metadata(architecture, config)
        _check_biases(architecture, config, kept)
    elif projections := [name for name in architecture.projections if name in kept]:
        raise UserError(
            f"A native folder has no place for {listed(projections)}, by which embeddings are multiplied. Choose a "
            "GGUF type, such as gguf:Q4_0."
        )


def _mix(target: Target, architecture: Architecture, config: dict[str, Any], kept: Shapes) -> dict[str, str]:
    """Returns tensor -> type in the mix that the target is; {} for any other target."""
    if target.type not in MIXES:
        return {}
    columns = {name: shape[1] for name, shape in kept.items() if len(shape) == 2}
    return mix_types(target.type, architecture, config, columns, block_count(config))


def _check_biases(architecture: Architecture, config: dict[str, Any], kept: Shapes) -> None:
    """Raises UserError if the model lacks a bias without which llama.cpp does not load it."""
    names = gguf_names(architecture, block_count(config)) if architecture.biased else {}
    if missing := [name for name in names if name.endswith(".bias") and name not in kept]:
        raise UserError(
            f"llama.cpp loads {architecture.classes[0]} only with all biases, and the model has no {listed(missing)}. "
            "Choose a native target, such as native:table-4."
        )


def _check_experts(planned: list[PlannedTensor], names: dict[str, str]) -> None:
    """Raises UserError if the experts of a block are in different types, since they share one GGUF tensor.

    names   Hugging Face name -> GGUF name
    """
    types: dict[str, str] = {}
    for tensor in planned:
        if types.setdefault(names[tensor.name], tensor.codec_name) != tensor.codec_name:
            raise UserError(
                f"llama.cpp stores the experts of a block in one type: choose the same one for all of them "
                f"({tensor.name} would be in {tensor.codec_name}, others in {types[names[tensor.name]]})."
            )


def _check_target(target: Target) -> None:
    known = [*targets(), str(AUTO)]
    if str(target) not in known:
        raise UserError(unknown("target", str(target), [*known, *GPTQ, *names("mlx"), *EXL3, "exl2"]))


def _check_types(types: Mapping[str, str], shapes: Shapes) -> None:
    for pattern, codec_name in types.items():
        if codec_name not in (known := [*names("gguf"), *names("native")]):
            raise UserError(unknown("type", codec_name, known, f" for {pattern}"))
    check_names(types, shapes)


def _overrides(
    architecture: Architecture, config: dict[str, Any], embedding_type: str | None, output_type: str | None
) -> dict[str, str]:
    """Returns tensor -> codec name for the options of embedding and output; `Q6_K` is short for `gguf:Q6_K`."""
    if is_tied(config):
        embedding_type, output_type = embedding_type or output_type, None
    chosen = {architecture.embedding: embedding_type, architecture.output: output_type}
    overrides = {name: full_name(type_name) for name, type_name in chosen.items() if type_name}
    for codec_name in overrides.values():
        if codec_name not in (known := [*names("gguf"), *names("native")]):
            raise UserError(unknown("type", codec_name, known, " for embedding or output"))
    return overrides


def _wanted(target: Target, architecture: Architecture, mix: Mapping[str, str], name: str) -> str:
    """Returns the codec name that the target asks for, whether the tensor's shape fits or not.

    mix   tensor -> type in the mix that the target is; empty for any other target
    """
    linear = is_linear(architecture, name)
    further = is_further_matrix(architecture, name)  # no calibration reaches it, so it keeps more bits
    if not linear and not further and not is_rounded(architecture, name):
        return plain_codec(architecture, name) if target.family == "gguf" else "gguf:F32"
    if target.family == "native":
        return str(target) if linear else "gguf:F16"
    if name in mix:
        return f"gguf:{mix[name]}"
    is_pure = not target.is_auto and target.type not in MIXES
    return str(target) if is_pure and (linear or _is_plain(str(target))) else "gguf:Q8_0"


@lru_cache
def _is_plain(codec_name: str) -> bool:
    """Returns whether a codec rounds each weight alone, so that the solver has nothing to do."""
    return isinstance(codec_named(codec_name), PlainCodec)


def _fitted(architecture: Architecture, name: str, shape: tuple[int, ...], wanted: str) -> PlannedTensor:
    """Returns the tensor in the codec `wanted`, or in a fallback if the columns are no multiple of its block."""
    columns, block = shape[-1], codec_named(wanted).block
    fits = columns % block == 0
    chosen = wanted if fits else _fallback(wanted, columns)
    linear = is_linear(architecture, name) and not _is_plain(chosen)
    if fits:
        return PlannedTensor(name, shape, chosen, linear)
    reason = f"{columns} columns are not a multiple of {block}"
    return PlannedTensor(name, shape, chosen, linear, wanted, reason)


def _fallback(wanted: str, columns: int) -> str:
    family, _, type_name = wanted.partition(":")
    if family == "gguf":
        return f"gguf:{fallback_type(type_name, columns)}"
    # For affine-BITS-gGROUP, take the largest group size that divides the columns.
    affine_bits = type_name.rpartition("-")[0]
    same_bits = [name for name in names("native") if name.startswith(f"native:{affine_bits}-g")]
    fitting = [name for name in same_bits if columns % codec_named(name).block == 0]
    return max(fitting, key=lambda name: codec_named(name).block, default="gguf:F16")
