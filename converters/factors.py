"""Low-rank factors of a linear as tensors of their own, named as PEFT names them.

The linear X.weight [R, C] with a correction B A of rank k has X.lora_A.weight [k, C] and X.lora_B.weight [R, k] beside
it: the weight is the sum of what X.weight decodes to and B A.
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
    """Names of A and B of a linear: `x.q_proj.weight` -> `x.q_proj.lora_A.weight`, `x.q_proj.lora_B.weight`."""
    module = weight.removesuffix(".weight")
    return module + A, module + B


def is_factor(name: str) -> bool:
    """Whether a tensor is a factor of a correction."""
    return name.endswith((A, B))


def corrected_linear(name: str) -> str:
    """The linear that a factor corrects: undoes `factor_names`."""
    return name.removesuffix(A).removesuffix(B) + ".weight"


def check_present(artifact: Artifact) -> None:
    """Raises UserError where a finished artifact holds no factors."""
    if not any(is_factor(name) for name in artifact.manifest()):
        raise UserError(f"{artifact.folder} holds no low-rank correction. Quantize again with --rank.")


def block_codec(kind: str, what: str) -> str:
    """The full name of a type for `what`; `F16` is short for `gguf:F16`.

    Raises UserError where there is no such type, or where some of its numbers are of a whole row: a correction of a
    smaller rank could then not be cut out of it, nor an input be rounded before all of it is known.
    """
    name = full_name(kind)
    try:
        found = codec_named(name)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    if isinstance(found, GridCodec) and (found.scale is None or not found.scale.group):
        raise UserError(f"{what} cannot be in {name}: give a type with numbers per block of columns, such as Q8_0.")
    return name


def planned_factors(planned: list[PlannedTensor], rank: int, kind: str) -> list[PlannedTensor]:
    """A and B of every linear, at `rank`. Raises UserError where the type `kind` cannot hold them."""
    name = block_codec(kind, "factors")
    block = codec_named(name).block
    if rank % block:
        raise UserError(f"factors in {name} need a rank that is a multiple of {block}, not {rank}.")
    factors = []
    for tensor in planned:
        if not tensor.linear:
            continue
        rows, columns = tensor.matrix
        if columns % block:
            raise UserError(f"{name} holds rows of a multiple of {block}, but {tensor.name} has {columns} columns.")
        if rank > min(rows, columns):
            raise UserError(f"{tensor.name} is {rows} x {columns}: a correction of rank {rank} is no smaller than it.")
        down, up = factor_names(tensor.name)
        factors += [PlannedTensor(down, (rank, columns), name, False), PlannedTensor(up, (rows, rank), name, False)]
    if not factors:
        raise UserError("Nothing to correct: the target stores every linear in a plain type. Leave out rank.")
    return factors
