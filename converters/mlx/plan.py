"""Plans MLX targets: which tensors are quantized, and into which type.

    mlx:TYPE    every linear of the decoder blocks, the embedding and the output in one type, as mlx-lm's converter does
    mlx:auto    the types that the caller gives (`lqexport.pipeline.types_by_size` chooses them), else 8 bits

All other tensors are in the dtype of the model. The solver works on the output, too, and on an embedding that is also
the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lqexport.converters.mlx.names import check_experts
from lqexport.converters.mlx.support import check_supported
from lqexport.converters.mlx.types import FAMILY, PLAIN, in_dtype, in_half, types
from lqexport.converters.model_tensors import model_tensors
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of, normalized
from lqexport.converters.models.tensor_names import is_linear, is_tied
from lqexport.converters.plan import PlannedTensor, Shapes, check_names, matches, refuse_fallbacks
from lqexport.errors import UserError
from lqexport.formats.registry import codec_named, names
from lqexport.target import Target, unknown

START = "mlx:8-g64"
"""The type of a tensor before one is chosen for it by size."""


def plan_mlx(
    target: Target,
    config: dict[str, Any],
    shapes: Shapes,
    *,
    embedding_type: str | None = None,
    output_type: str | None = None,
    types_by_name: Mapping[str, str] = MappingProxyType({}),
    fallback: bool = True,
) -> list[PlannedTensor]:
    """Returns the codec of every tensor of a model, in the model's order. The arguments are those of `targets.plan`.

    Raises UserError if the target or a type is unknown, if mlx-lm does not run the model, if a tensor would fall back
    and `fallback` is false, and as `targets.model_tensors` does.
    """
    config = normalized(config)
    architecture, half = architecture_of(config), in_half(config)
    kept = model_tensors(architecture, config, shapes)
    if str(target) not in [*types(), f"{FAMILY}:auto"]:
        raise UserError(unknown("target", str(target), [*types(), f"{FAMILY}:auto"]))
    check_supported(architecture, config)
    outer = {architecture.embedding: embedding_type, architecture.output: output_type}
    if is_tied(config):
        outer = {architecture.embedding: embedding_type or output_type}
    chosen = {name: type_name for name, type_name in outer.items() if type_name} | dict(types_by_name)
    for type_name in chosen.values():
        if type_name not in [*names(FAMILY), *PLAIN.values()]:
            raise UserError(f"MLX has no type {type_name}: take one of {', '.join(types())}, F16 or BF16.")
    check_names(types_by_name, kept)
    usual = START if target.is_auto else str(target)
    planned = []
    for name, shape in kept.items():
        matching = [type_name for pattern, type_name in chosen.items() if matches(pattern, name, shape)]
        quantized = is_linear(architecture, name) or name in outer or name in architecture.tables
        wanted = matching[-1] if matching else usual if quantized and len(shape) == 2 else PLAIN[half]
        planned.append(_fitted(name, shape, in_dtype(wanted, half), half, _solved(architecture, config, name)))
    check_experts(str(config.get("model_type")), {tensor.name: tensor.codec_name for tensor in planned})
    if not fallback:
        refuse_fallbacks(target, planned)
    return planned


def _solved(architecture: Architecture, config: dict[str, Any], name: str) -> bool:
    """Returns whether the solver works on a tensor if its type has a grid."""
    return is_linear(architecture, name) or name == (architecture.embedding if is_tied(config) else architecture.output)


def _fitted(name: str, shape: tuple[int, ...], wanted: str, half: bool, solved: bool) -> PlannedTensor:
    """Returns the tensor in the codec `wanted`, or in a fallback if its columns are no whole groups.

    It is the type of as many bits with the largest groups that divide the columns, else plain numbers, which mlx-lm
    takes, too: in float16 if `half`, else in bfloat16.
    """
    columns, block = shape[-1], codec_named(wanted).block
    if columns % block == 0:
        return PlannedTensor(name, shape, wanted, solved and wanted.startswith(FAMILY))
    alike = [type_name for type_name in types() if type_name.partition("-")[0] == wanted.partition("-")[0]]
    fitting = [in_dtype(type_name, half) for type_name in alike if columns % codec_named(type_name).block == 0]
    chosen = max(fitting, key=lambda type_name: codec_named(type_name).block, default=PLAIN[half])
    reason = f"{columns} columns are not a multiple of {block}"
    return PlannedTensor(name, shape, chosen, solved and chosen.startswith(FAMILY), wanted, reason)
