"""Everything that decides what `quantize` computes, in one place; the artifact stores it."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lqexport.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Method = Literal["rtn", "gptq", "lean"]
Solver = Literal["blocked", "exact"]
Moments = Literal["plain", "normalized", "guided"]
Scaling = Literal["lqer", "l2qer", "qera-diag", "qera"]
ComputeDtype = Literal["float32", "bfloat16"]
Prefix = Literal["full", "quantized"]
ImportanceBase = Literal["cholesky", "inverse", "diagonal"]
AUTO = "gguf:auto"
LEAST = {"samples": 1, "sequence_length": 8, "dampening": 0.0, "descent": 0, "output_groups": 1, "tune": 0}
LEAST |= {"rank": 0, "factor_bytes": 0, "rounds": 1}


@dataclass(frozen=True)
class Recipe:
    """Options of `lqexport quantize`; each is explained by its `--help`. Where moments, prefix, asymmetric and smooth
    are None, `lqexport.planning.defaults` settles them by the model."""

    source: str
    target: str
    method: Method = "lean"
    solver: Solver = "blocked"
    calibration: str = "python-docs"
    samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    moments: Moments | None = None
    output_groups: int = 1
    guided_power: float = 0.5
    prefix: Prefix | None = None
    compute_dtype: ComputeDtype | None = None
    asymmetric: bool | None = None
    smooth: bool | None = None
    dampening: float | None = None
    importance: ImportanceBase = "diagonal"
    exponent: float = 1.0
    act_order: bool = True
    descent: int = 4
    tune: int | None = None
    tune_rate: float = 0.0012
    rank: int = 0
    scaling: Scaling = "qera"
    factors: str = "F16"
    factor_bytes: int = 0
    rounds: int = 1
    merge: bool = False
    embedding_type: str | None = None
    output_type: str | None = None
    fallback: bool = True
    types: list[str] = field(default_factory=list)
    size: str | None = None
    bits: float | None = None
    head_bits: int = 6

    def __post_init__(self) -> None:
        choices = {"method": Method, "moments": Moments, "prefix": Prefix, "importance": ImportanceBase}
        choices |= {"scaling": Scaling, "compute_dtype": ComputeDtype, "solver": Solver}
        for name, literal in choices.items():
            if (value := getattr(self, name)) is not None and value not in get_args(literal):
                raise UserError(f"{name} cannot be {value!r}; choose one of {', '.join(get_args(literal))}.")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} must be at least {least}, not {value}.")
        if (self.size is not None) != (self.target == AUTO):
            raise UserError(f"A size and the target {AUTO} go together: the types are then chosen to fit the size.")
        if self.size is not None and (self.moments not in (None, "guided") or self.method == "rtn"):
            raise UserError("Choosing types by size needs guided moments: their loss compares tensors with each other.")
        if self.moments == "guided" and self.prefix == "quantized" and self.asymmetric is False:
            raise UserError(
                "Guided second moments come from the full-precision model: with the quantized prefix, take "
                "--asymmetric, or --moments normalized."
            )
        if self.output_groups > 1 and (self.prefix == "quantized" or self.asymmetric):
            raise UserError("With the quantized prefix a linear has one output group: leave out output_groups.")
        if self.output_groups > 1 and self.moments not in (None, "guided"):
            raise UserError("Only guided second moments differ between output groups: set moments to 'guided'.")
        if not 0 < self.guided_power <= 1:
            raise UserError(f"guided_power must be above 0 and at most 1, not {self.guided_power}.")
        if self.solver == "exact" and self.method == "rtn":
            raise UserError("Method rtn solves nothing: leave out the solver exact, or take method lean.")
        if self.smooth and self.method == "rtn":
            raise UserError("Smoothing takes the size of inputs from the calibration, and method rtn has none.")
        if self.asymmetric and self.prefix == "full":
            raise UserError("Asymmetric calibration corrects for quantized inputs: it needs prefix 'quantized'.")
        self._check_correction()
        self._check_exl2()
        self._check_folder()

    def _check_correction(self) -> None:
        if not self.rank and (self.factor_bytes or self.merge or self.rounds > 1):
            raise UserError("factor_bytes, rounds and merge say more of a low-rank correction: give its rank too.")
        if self.rank and self.size is not None:
            raise UserError("A size chooses types for a model without low-rank corrections: leave out rank.")
        if self.factor_bytes and (self.prefix == "quantized" or self.asymmetric):
            raise UserError("factor_bytes is shared at the end, so later blocks cannot see it: take prefix full.")
        if self.merge and self.factor_bytes:
            raise UserError("factor_bytes shares bytes among stored factors, and merge stores none: give one of them.")

    def _check_exl2(self) -> None:
        if (self.target == "exl2") != (self.bits is not None):
            raise UserError("The target exl2, and no other, needs --bits: how many the linears may take per weight.")
        if self.target == "exl2" and (self.embedding_type or self.output_type or self.types):
            raise UserError("EXL2 keeps the embedding in float16 and chooses the rest; --head-bits sets the output.")

    def _check_folder(self) -> None:
        gptq = self.target.startswith("gptq:")
        if gptq and (self.embedding_type or self.output_type or self.types):
            raise UserError("GPTQ's layout has one type for all linears, and float16 for embedding and output.")
        if (gptq or self.target == "exl2") and self.output_groups > 1:
            raise UserError("EXL2 and GPTQ's layout have the outputs as columns: they take one output group.")

    @property
    def chooses(self) -> bool:
        """Whether types or mixes are chosen to fit a size."""
        return self.size is not None or self.bits is not None

    @property
    def reorders(self) -> bool:
        """Whether the target stores columns in act-order."""
        return self.target == "exl2" or self.target.endswith("-act")

    def chosen_types(self) -> dict[str, str]:
        """Tensor name pattern -> codec, from `types`. Raises UserError where one is not PATTERN=TYPE."""
        pairs = [entry.partition("=") for entry in self.types]
        if wrong := [entry for entry, (_, _, kind) in zip(self.types, pairs, strict=True) if not kind]:
            raise UserError(f"A type for some tensors is like '*.down_proj.weight=Q6_K', not {wrong[0]!r}.")
        return {pattern: kind if ":" in kind else f"gguf:{kind}" for pattern, _, kind in pairs}

    @property
    def tuned_sequences(self) -> int:
        """Sequences of end-to-end tuning: what `tune` says, or the default of the method."""
        if self.tune is not None:
            return self.tune
        return 64 if self.method == "lean" else 0

    def compute_dtype_on(self, device: str) -> ComputeDtype:
        """What passes multiply in on a type of device: what `compute_dtype` says, or the default."""
        return self.compute_dtype or ("bfloat16" if device == "cuda" else "float32")


def load_recipe(path: Path) -> dict[str, Any]:
    """Options from a TOML file, for `Recipe(**options)`. Raises UserError for an unknown option or a wrong type."""
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read the recipe {path}: {error}.") from error
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for name, value in options.items():
        if name not in fields:
            raise UserError(f"{path}: unknown option {name!r}. Known: {', '.join(fields)}.")
        kinds: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}
        kinds["list[str]"] = list
        wanted = str(fields[name].type).split(" |")[0]
        whole = all(isinstance(item, str) for item in value) if isinstance(value, list) else True
        if not whole or not isinstance(value, kinds.get(wanted, str)) or (wanted != "bool" and isinstance(value, bool)):
            raise UserError(f"{path}: {name} must be a {wanted if wanted in kinds else 'str'}, not {value!r}.")
    return options
