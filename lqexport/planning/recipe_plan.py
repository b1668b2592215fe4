"""The plan of a recipe: which codec will store every tensor of the source."""

from __future__ import annotations

from dataclasses import replace

from lqexport.converters.exl2.plan import check_corrections, plan_exl2
from lqexport.converters.exl3.plan import plan_exl3
from lqexport.converters.factors import planned_factors
from lqexport.converters.folders.gptq import plan_gptq
from lqexport.converters.gguf.scales import with_scales
from lqexport.converters.mlx.plan import plan_mlx
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.tensor_names import is_linear
from lqexport.converters.plan import PlannedTensor
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.formats.codec import PlainCodec
from lqexport.formats.registry import codec_named
from lqexport.models.context import learned_positions
from lqexport.models.interface import ModelShapes
from lqexport.models.source_grids import outer_types, with_moves
from lqexport.recipe import Recipe
from lqexport.sizes import model_size
from lqexport.solver.solve_exact import check_exact


def plan_recipe(source: ModelShapes, recipe: Recipe, chosen: dict[str, str] | None = None) -> list[PlannedTensor]:
    """Returns every tensor of the source with the codec that will store it.

    `chosen` has the codec names chosen for a size, by tensor name. Raises UserError if the target cannot hold the
    model, or if the solver does not support the target.
    """
    planned = _planned(source, recipe, chosen)
    if recipe.solver == "exact":
        check_exact(tensor for tensor in planned if tensor.linear)
    # Corrections and choices of types measure the loss of solving, so every linear is solved.
    return planned if recipe.rank or recipe.bits or (recipe.size and not chosen) else with_moves(source, planned)


def size_limit(source: ModelShapes, recipe: Recipe, planned: list[PlannedTensor]) -> int | None:
    """Returns the bytes of tensor data that the recipe's size stands for; None if it has none.

    Raises UserError if the size is none, or the name of a target that is unknown or cannot hold the model.
    """
    if recipe.size is None:
        return None

    def bytes_of(target: str) -> int:
        same_but_target = replace(recipe, target=target, size=None, types=[])
        return sum(tensor.nbytes for tensor in plan_recipe(source, same_but_target))

    return model_size(recipe.size, sum(tensor.weights for tensor in planned), bytes_of)


def spared_bytes(planned: list[PlannedTensor], limit: int | None) -> int:
    """Returns by how many bytes the planned types exceed what `size_limit` returns, which types to be chosen keep."""
    return 0 if limit is None else max(0, sum(tensor.nbytes for tensor in planned) - limit)


def check_sequence_length(recipe: Recipe, source: ModelShapes, planned: list[PlannedTensor]) -> None:
    """Raises UserError if the calibration sequences are longer than the positions that the model has learned."""
    positions = learned_positions(source.config)
    if positions is not None and recipe.sequence_length > positions and calibrates(recipe, source, planned):
        raise UserError(
            f"The model has {positions} positions, and calibration sequences of {recipe.sequence_length} tokens do not "
            f"fit: take at most {positions} as --sequence-length."
        )


def calibrates(recipe: Recipe, source: ModelShapes, planned: list[PlannedTensor]) -> bool:
    """Returns whether a run of `recipe` needs calibration sequences: a plain type has no grid and needs none."""
    output = architecture_of(source.config).output
    linears = [tensor for tensor in planned if tensor.linear and tensor.name != output]
    solved = any(not isinstance(codec_named(tensor.codec_name), PlainCodec) for tensor in linears)
    return solved and recipe.calibrates


def _planned(source: ModelShapes, recipe: Recipe, chosen: dict[str, str] | None) -> list[PlannedTensor]:
    shapes = {name: source.shape(name) for name in source.names()}
    target = recipe.parsed_target
    if target.family == "gptq":
        return plan_gptq(target, source.config, shapes)
    if target.family == "exl3":
        return plan_exl3(target, source.config, shapes, bits=recipe.bits, head_bits=recipe.head_bits)
    if recipe.bits is not None:
        if recipe.rank and not recipe.merge:
            check_corrections(source.config)
        return plan_exl2(source.config, shapes, bits=recipe.bits, head_bits=recipe.head_bits, fallback=recipe.fallback)
    types = (chosen or {}) | recipe.types_by_pattern()
    if target.family == "mlx":
        return plan_mlx(target, source.config, shapes, embedding_type=recipe.embedding_type,
                        output_type=recipe.output_type, types_by_name=types, fallback=recipe.fallback)  # fmt: skip
    embedding, output = outer_types(source, target)
    planned = plan(target, source.config, shapes, embedding_type=recipe.embedding_type or embedding,
                   output_type=recipe.output_type or output, types=types, fallback=recipe.fallback,
                   further=recipe.mtp)  # fmt: skip
    if target.family != "gguf" or (recipe.rank and not recipe.merge):
        return planned  # llama.cpp stops where a matrix with a further scale has a correction, too
    return with_scales(architecture_of(source.config), source.config["num_hidden_layers"], planned)


def plan_factors(source: ModelShapes, planned: list[PlannedTensor], recipe: Recipe) -> list[PlannedTensor]:
    """Returns the low-rank factors that a run of `recipe` stores beside the linears of the decoder blocks."""
    if not recipe.rank or recipe.merge:
        return []
    architecture = architecture_of(source.config)
    linears = [tensor for tensor in planned if is_linear(architecture, tensor.name)]
    return planned_factors(linears, recipe.rank, recipe.factors)
