"""Low-rank factors of a linear as separate tensors, with the names that PEFT gives them.

A linear X.weight [R, C] with a correction of rank k has the tensors X.lora_A.weight [k, C] and X.lora_B.weight [R, k]
beside it. Its weight is the decoded X.weight plus B A.
"""

from __future__ import annotations

from lqexport.converters.plan import PlannedTensor
from lqexport.errors import UserError
from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact
from lqexport.target import full_name

A, B = ".lora_A.weight", ".lora_B.weight"


def factor_names(weight: str) -> tuple[str, str]:
    """Returns the names of A and B: `x.q_proj.weight` -> `x.q_proj.lora_A.weight`, `x.q_proj.lora_B.weight`."""
    module = weight.removesuffix(".weight")
    return module + A, module + B


def is_factor(name: str) -> bool:
    """Returns whether a tensor is a low-rank factor."""
    return name.endswith((A, B))


def corrected_linear(name: str) -> str:
    """Returns the weight of the linear that a low-rank factor corrects, the inverse of `factor_names`."""
    return name.removesuffix(A).removesuffix(B) + ".weight"


def check_present(artifact: Artifact) -> None:
    """Raises UserError if a finished artifact holds no low-rank factors."""
    if not any(is_factor(name) for name in artifact.manifest()):
        raise UserError(f"{artifact.folder} holds no low-rank correction. Quantize again with --rank.")


def block_codec(type_name: str, use: str) -> str:
    """Returns the full name of a type whose numbers (scales, offsets) are stored per block of columns.

    type_name   the type; `F16` is short for `gguf:F16`
    use         what the type will store, for the messages

    Raises UserError if there is no such type, or if some of its numbers are stored per row. With numbers per row, a
    correction of a smaller rank could not be cut out of a larger one, and an input could not be rounded before all of
    it is known.
    """
    codec_name = full_name(type_name)
    try:
        codec = codec_named(codec_name)
    except ValueError as error:
        raise UserError(f"{use}: {error}") from error
    if isinstance(codec, GridCodec) and (codec.scale is None or not codec.scale.group):
        raise UserError(
            f"{use} cannot be in {codec_name}: give a type with numbers per block of columns, such as Q8_0."
        )
    return codec_name


def planned_factors(planned: list[PlannedTensor], rank: int, type_name: str) -> list[PlannedTensor]:
    """Returns the low-rank factors A and B of every planned linear, at one rank and in one type.

    Raises UserError if the type cannot hold them, if the rank is too large for a linear, or if there is no linear.
    """
    codec_name = block_codec(type_name, "factors")
    block = codec_named(codec_name).block
    if rank % block:
        raise UserError(f"factors in {codec_name} need a rank that is a multiple of {block}, not {rank}.")
    factors = []
    for tensor in planned:
        if not tensor.linear:
            continue
        rows, columns = tensor.matrix
        if columns % block:
            raise UserError(
                f"{codec_name} holds rows of a multiple of {block}, but {tensor.name} has {columns} columns."
            )
        if rank > min(rows, columns):
            raise UserError(f"{tensor.name} is {rows} x {columns}: a correction of rank {rank} is no smaller than it.")
        down, up = factor_names(tensor.name)
        factors += [
            PlannedTensor(down, (rank, columns), codec_name, False),
            PlannedTensor(up, (rows, rank), codec_name, False),
        ]
    if not factors:
        raise UserError("Nothing to correct: the target stores every linear in a plain type. Leave out rank.")
    return factors
