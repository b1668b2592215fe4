"""The recipe: all options that decide what `quantize` computes. The artifact stores it.

Each option is declared once, as a field of `Recipe`: its name, type, default, help and panel. The command line and the
TOML files are made from these fields (`lqexport.cli.options`, `load_recipe`).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lqexport.arguments import taken
from lqexport.errors import UserError, check_least
from lqexport.target import AUTO, Target, full_name, implied_target, spelled

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
Effort = Literal["fast", "default", "best"]
Without = Literal["iq"]

CHOICES: dict[str, Any] = {
    "method": Method, "solver": Solver, "moments": Moments, "scaling": Scaling, "compute_dtype": ComputeDtype,
    "prefix": Prefix, "importance": ImportanceBase, "effort": Effort,
    "without": Without,
}  # fmt: skip
LEAST: dict[str, float] = {"samples": 1, "sequence_length": 8, "dampening": 0, "exponent": 0, "descent": 0}
LEAST |= {"output_groups": 1, "bits": 0, "tune": 0, "tune_rate": 0, "rank": 0, "factor_bytes": 0, "rounds": 1}
"""The least value of each option that is a number, which must be finite, too."""

SWEEPS: dict[Effort, int] = {"fast": 0, "default": 2, "best": 5}
"""Sweeps of coordinate descent by effort."""
WALK_SWEEPS: dict[Effort, int] = {"fast": 0, "default": 0, "best": 2}
"""The same for EXL3. Two sweeps take 1.3 times as long as the search before them, and lower the error by some 1 per
cent (docs/exl3.md)."""
TUNED = 64
"""Sequences of end-to-end tuning, where it is the default."""
TUNED_BELOW = 4
"""GGUF, MLX, EXL2 and EXL3 of fewer bits are tuned by default. From 4 bits on, tuning takes longer than the rest of a
run, and lowers the loss by some 3 per cent at most (docs/experiments.md)."""

CALIBRATION_TEXT = "general"
CALIBRATION_HELP = (
    "Text to calibrate on: general (of many sorts; needs no network), python-docs, wikitext2, c4, ptb, or a .txt or "
    ".jsonl file, also of conversations."
)
CALIBRATION, SOLVER, TYPES = "Calibration", "Solver", "Types of single tensors"
TUNING, CORRECTION = "End-to-end tuning", "Low-rank correction"
"""Panels of `quantize --help`; options without a panel are of the common path and come first."""


def _help(text: str, panel: str | None = None, flags: str | None = None) -> dict[str, str | None]:
    """Returns the command line's text on an option, as the metadata of its field.

    text    its help, to which the default is added if there is one
    flags   its names on the command line, if they are not made from the field's name
    """
    return {"help": text, "panel": panel, "flags": flags}


@dataclass(frozen=True)
class SolverSettings:
    """The options of a recipe that the solver of one linear needs."""

    method: Method
    solver: Solver
    dampening: float | None
    importance: ImportanceBase
    exponent: float
    act_order: bool
    descent: int


@dataclass(frozen=True)
class CorrectionSettings:
    """The options of a recipe that the low-rank correction of one linear needs."""

    rank: int
    scaling: Scaling
    factors: str
    rounds: int
    merge: bool


@dataclass(frozen=True)
class Recipe:
    """Options of `lqexport quantize`; its `--help` explains each.

    `lqexport.planning.defaults` settles moments, prefix, asymmetric and smooth by the model where they are None.
    Raises UserError for values that no option has and for options that exclude each other.
    """

    source: str
    target: str = field(
        default="",
        metadata=_help(
            "What to quantize into: gguf:Q4_K_M, gguf:IQ3_XXS, gguf:auto or mlx:auto (with --size), mlx:4-g64, "
            "native:table-3, gptq:4-g128, exl3:4, exl3 or exl2 (with --bits)."
        ),
    )
    size: str | None = field(
        default=None,
        metadata=_help(
            "The most that all tensors together may take, such as 4.25bpw, 3.9GB, 700MiB or Q4_K_M (the size of that "
            "mix); their types are chosen to lose least. For the targets gguf:auto (the default with a size) and "
            "mlx:auto."
        ),
    )
    without: Without | None = field(
        default=None,
        metadata=_help("iq: choose no i-quants (IQ1 to IQ4), which are slow on CPUs. For the target gguf:auto."),
    )
    bits: float | None = field(
        default=None,
        metadata=_help("Targets exl3 and exl2: bits per weight of the linears on average, such as 3.5."),
    )
    calibration: str = field(
        default=CALIBRATION_TEXT,
        metadata=_help(CALIBRATION_HELP),
    )
    samples: int = field(default=64, metadata=_help("Calibration sequences."))
    effort: Effort = field(
        default="default",
        metadata=_help(
            "Time against loss. fast: one pass of the source, no refinement; default; best: more refinement, and "
            "tuning of every type. Other options override it. Processor seconds and KL divergence of a model of 135M "
            "parameters in Q4_K_S, calibrated on python-docs: fast 124 and 0.083, default 280 and 0.076, best 1288 and "
            "0.072."
        ),
    )

    sequence_length: int = field(default=512, metadata=_help("Tokens in each calibration sequence.", CALIBRATION))
    imatrix: str | None = field(
        default=None,
        metadata=_help(
            "File of an importance matrix of llama.cpp: weigh columns by it, and run no calibration passes. For models "
            "that are too large for passes.",
            CALIBRATION,
        ),
    )
    seed: int = field(default=0, metadata=_help("Draws the sequences from the text.", CALIBRATION))
    moments: Moments | None = field(
        default=None,
        metadata=_help(
            "Weight of a token in the second moments. plain: 1; normalized: 1 / its squared norm; "
            "guided: the squared gradient of the loss. [default: normalized; guided where the prefix "
            "is full or types are chosen]",
            CALIBRATION,
        ),
    )
    guided_power: float = field(
        default=0.5,
        metadata=_help(
            "Power of a token's weight in guided moments: lower, fewer tokens rule. GuidedQuant: 1.", CALIBRATION
        ),
    )
    output_groups: int = field(
        default=1, metadata=_help("Runs of a linear's outputs that have guided moments of their own.", CALIBRATION)
    )
    prefix: Prefix | None = field(
        default=None,
        metadata=_help(
            "Where the inputs of a block come from: the full or the quantized blocks before it. "
            "[default: quantized; full for experts, encoders and linears of more than 16384 inputs]",
            CALIBRATION,
        ),
    )
    asymmetric: bool | None = field(
        default=None,
        metadata=_help(
            "Aim at the outputs and hidden states of the full-precision model, as far as held-out "
            "sequences gain. [default: where the prefix is quantized]",
            CALIBRATION,
            "--asymmetric/--symmetric",
        ),
    )
    smooth: bool | None = field(
        default=None,
        metadata=_help(
            "Scale columns of linears, and the norms before them by the inverse, so that inputs round"
            " better to 8 bits. LoRA adapters trained on the source do not fit such a file. [default:"
            " for GGUF types of 4 bits or more]",
            CALIBRATION,
            "--smooth/--no-smooth",
        ),
    )
    compute_dtype: ComputeDtype | None = field(
        default=None,
        metadata=_help(
            "Dtype that calibration passes multiply in: float32, or bfloat16 where the hardware is "
            "faster at it. [default: bfloat16 on a GPU, and on a CPU that multiplies it twice as fast as float32 or "
            "faster, which is measured; else float32]",
            CALIBRATION,
        ),
    )

    method: Method = field(
        default="lean",
        metadata=_help(
            "lean: grids that are aware of the loss, error feedback, refinement; gptq: min-max grids,"
            " error feedback; rtn: rounding to nearest.",
            SOLVER,
        ),
    )
    solver: Solver = field(
        default="blocked",
        metadata=_help(
            "blocked: one order of columns for all rows; exact: each row in its own, for small models.", SOLVER
        ),
    )
    dampening: float | None = field(
        default=None,
        metadata=_help(
            "Share of the mean of the Hessian's diagonal that is added to the diagonal. [default: half of its median]",
            SOLVER,
        ),
    )
    importance: ImportanceBase = field(
        default="diagonal", metadata=_help("What weighs errors: diagonal, cholesky or inverse.", SOLVER)
    )
    exponent: float = field(default=1.0, metadata=_help("Power of the importance.", SOLVER))
    act_order: bool = field(
        default=True, metadata=_help("Solve columns by falling activation.", SOLVER, "--act-order/--no-act-order")
    )
    descent: int | None = field(
        default=None,
        metadata=_help(
            "Sweeps of coordinate descent after error feedback. [default: 2; effort fast 0, best 5; exl3 0, best 2]",
            SOLVER,
        ),
    )

    types: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Type for the tensors whose names fit a pattern: '*.down_proj.weight=Q6_K'. May repeat.", TYPES, "--type"
        ),
    )
    embedding_type: str | None = field(default=None, metadata=_help("Type of the embedding, such as Q6_K.", TYPES))
    output_type: str | None = field(default=None, metadata=_help("Type of the output, such as Q6_K.", TYPES))
    head_bits: int = field(
        default=6, metadata=_help("Targets exl3 and exl2: bits of the output's weights; 16 for float16.", TYPES)
    )
    mtp: bool = field(
        default=True,
        metadata=_help(
            "Whether a GGUF file keeps the blocks that predict further tokens, with which llama.cpp drafts them.",
            TYPES,
            "--mtp/--no-mtp",
        ),
    )
    fallback: bool = field(
        default=True,
        metadata=_help(
            "Whether a tensor may take another type if its shape does not fit.", TYPES, "--fallback/--no-fallback"
        ),
    )

    tune: int | None = field(
        default=None,
        metadata=_help(
            "Sequences to tune norms and stored scales on; 0: none. [default: 64 for method lean; 0 for GGUF, MLX, "
            "EXL2 and EXL3 of 4 bits or more, and for effort fast]",
            TUNING,
        ),
    )
    tune_rate: float = field(
        default=0.0012,
        metadata=_help("Largest relative change of a tuned number in a step, where the KL is 1 nat.", TUNING),
    )

    rank: int = field(
        default=0, metadata=_help("Rank of the low-rank correction of each linear; 0 for none.", CORRECTION)
    )
    scaling: Scaling = field(
        default="qera",
        metadata=_help("What the correction weighs errors by: lqer, l2qer, qera-diag or qera.", CORRECTION),
    )
    factors: str = field(
        default="F16",
        metadata=_help("Type of the low-rank factors: F16, BF16, F32, Q8_0, native:mxint-8-g16.", CORRECTION),
    )
    factor_bytes: int = field(
        default=0,
        metadata=_help(
            "Bytes to share among the linears' factors, at most --rank each; 0: the same rank for all.", CORRECTION
        ),
    )
    rounds: int = field(default=1, metadata=_help("How often codes and correction are solved for in turn.", CORRECTION))
    merge: bool = field(
        default=False,
        metadata=_help(
            "Solve the corrected weights into the format again, and store no factors.", CORRECTION, "--merge/--no-merge"
        ),
    )

    def __post_init__(self) -> None:
        if not self.target:
            object.__setattr__(self, "target", implied_target(self.size, self.bits))
        if not self.target:
            raise UserError(
                "No target: give --target, such as gguf:Q4_K_M, or --size, such as 4.25bpw, or a --recipe file that "
                "has one of them."
            )
        self._check_types()
        self._spell_names()
        for name, least in LEAST.items():
            check_least(least, **{name: getattr(self, name)})
        self._check_size()
        self._check_moments()
        self._check_method()
        self._check_imatrix()
        self._check_correction()
        self._check_bits()
        self._check_exl3()
        self._check_fixed_types()

    def _check_types(self) -> None:
        """Raises UserError for an option of a wrong type, and for a choice that there is not.

        Paths become text and tuples lists, as run.json stores them.
        """
        for option in dataclasses.fields(self):
            value = taken(option.name, getattr(self, option.name), str(option.type))
            object.__setattr__(self, option.name, value)
            choices = get_args(CHOICES.get(option.name))
            if choices and value not in choices and not (value is None and option.default is None):
                raise UserError(f"{option.name} cannot be {value!r}; choose one of {', '.join(choices)}.")

    def _spell_names(self) -> None:
        """Puts the names of targets and types into their one spelling, in which run.json stores them."""
        names: dict[str, Any] = {"target": str(self.parsed_target)}
        for name in ("size", "embedding_type", "output_type", "factors"):
            if isinstance(given := getattr(self, name), str):
                names[name] = spelled(given)
        names["types"] = [_spelled_type(entry) for entry in self.types]
        for name, value in names.items():
            object.__setattr__(self, name, value)  # a frozen dataclass settles its fields here alone

    def _check_size(self) -> None:
        if (self.size is not None) != self.parsed_target.is_auto:
            raise UserError(
                f"A size and the target {AUTO} or mlx:auto go together: the types are then chosen to fit the size."
            )
        if self.without and self.parsed_target != AUTO:
            raise UserError(
                f"--without leaves types out of a choice by size, which only the target {AUTO} makes: leave it out."
            )
        if self.size is not None and (self.moments not in (None, "guided") or self.method == "rtn"):
            raise UserError(
                "Types are chosen by size under guided moments, whose loss compares tensors with each other: leave out "
                "moments, and take method lean or gptq."
            )

    def _check_moments(self) -> None:
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
        if self.asymmetric and self.prefix == "full":
            raise UserError("Asymmetric calibration corrects for quantized inputs: it needs prefix 'quantized'.")

    def _check_method(self) -> None:
        if self.solver == "exact" and self.method == "rtn":
            raise UserError("Method rtn solves nothing: leave out the solver exact, or take method lean.")
        if self.smooth and self.method == "rtn":
            raise UserError(
                "Smoothing takes the size of inputs from the calibration, and method rtn has none: leave out smooth, "
                "or take method lean."
            )

    def _check_imatrix(self) -> None:
        if self.imatrix is None:
            return
        if self.parsed_target.family != "gguf" or self.chooses_types:
            raise UserError("An importance matrix is of llama.cpp's weights: it needs a target gguf:TYPE without size.")
        passes = {"rank": self.rank, "tune": self.tune, "asymmetric": self.asymmetric, "smooth": self.smooth}
        passes |= {"moments": self.moments not in (None, "plain"), "prefix": self.prefix == "quantized"}
        passes |= {"output_groups": self.output_groups > 1}
        if given := [name for name, value in passes.items() if value]:
            raise UserError(f"{given[0]} needs calibration passes, which imatrix leaves out: give one of them.")
        if self.method == "rtn" or self.solver == "exact":
            raise UserError("An importance matrix is for the method lean or gptq and the solver blocked.")

    def _check_correction(self) -> None:
        if not self.rank and (self.factor_bytes or self.merge or self.rounds > 1):
            raise UserError("factor_bytes, rounds and merge say more of a low-rank correction: give its rank too.")
        if self.rank and self.size is not None:
            raise UserError("A size chooses types for a model without low-rank corrections: leave out rank.")
        if self.factor_bytes and (self.prefix == "quantized" or self.asymmetric):
            raise UserError("factor_bytes is shared at the end, so later blocks cannot see it: take prefix full.")
        if self.merge and self.factor_bytes:
            raise UserError("factor_bytes shares bytes among stored factors, and merge stores none: give one of them.")

    def _check_bits(self) -> None:
        if self.parsed_target.takes_bits != (self.bits is not None):
            raise UserError(
                "The target exl2 or exl3, and no other, needs --bits: how many the linears may take per weight."
            )

    def _check_exl3(self) -> None:
        if self.parsed_target.family == "exl3" and self.rank:
            raise UserError("EXL3 is solved without low-rank corrections: leave out rank.")

    def _check_fixed_types(self) -> None:
        target = self.parsed_target
        if target.has_fixed_types and (self.embedding_type or self.output_type or self.types):
            if target.family in ("exl2", "exl3"):
                raise UserError(
                    f"{target.family.upper()} keeps the embedding in float16 and chooses the rest; --head-bits sets "
                    "the output."
                )
            raise UserError(
                "GPTQ's layout has one type for all linears, and float16 for embedding and output: leave out types of "
                "single tensors."
            )
        if target.rows_share_numbers and self.output_groups > 1:
            raise UserError("EXL2, EXL3 and GPTQ's layout have the outputs as columns: they take one output group.")

    @property
    def parsed_target(self) -> Target:
        """`target`, parsed."""
        return Target.parse(self.target)

    @property
    def solver_settings(self) -> SolverSettings:
        """The options that the solver of a linear needs."""
        return SolverSettings(**_same_fields(self, SolverSettings) | {"descent": self.sweeps})

    @property
    def correction_settings(self) -> CorrectionSettings:
        """The options that a low-rank correction needs."""
        return CorrectionSettings(**_same_fields(self, CorrectionSettings))

    @property
    def calibrates(self) -> bool:
        """Whether linears that have a grid are solved with calibration sequences. Rounding to nearest needs none; a
        low-rank correction needs them whatever the method."""
        return self.imatrix is None and (self.method != "rtn" or bool(self.rank))

    @property
    def chooses_types(self) -> bool:
        """Whether types or mixes of widths are chosen to fit a size."""
        return self.size is not None or self.bits is not None

    def types_by_pattern(self) -> dict[str, str]:
        """Returns pattern of tensor names -> codec name, from `types`.

        Raises UserError if an entry is not PATTERN=TYPE.
        """
        entries = [entry.partition("=") for entry in self.types]
        if wrong := [entry for entry, (_, _, type_name) in zip(self.types, entries, strict=True) if not type_name]:
            raise UserError(f"A type for some tensors is like '*.down_proj.weight=Q6_K', not {wrong[0]!r}.")
        return {pattern: full_name(type_name) for pattern, _, type_name in entries}

    @property
    def tuned_sequences(self) -> int:
        """Sequences of end-to-end tuning: `tune`, or the default for the bits of the target."""
        return self.tuning_for(self.named_bits) if self.tune is None else self.tune

    @property
    def named_bits(self) -> float | None:
        """Bits per weight that `bits` or the name of the target asks for; None if neither does."""
        return self.bits or self.parsed_target.bits

    def tuning_for(self, bits: float | None) -> int:
        """Returns the default number of sequences of end-to-end tuning, by method, effort and bits per weight."""
        wide = (bits or 0) >= TUNED_BELOW
        untuned = self.imatrix is not None or self.effort == "fast" or (self.effort == "default" and wide)
        return 0 if untuned or self.method != "lean" else TUNED

    @property
    def sweeps(self) -> int:
        """Sweeps of coordinate descent: `descent`, or the effort's default."""
        by_effort = WALK_SWEEPS if self.parsed_target.family == "exl3" else SWEEPS
        return by_effort[self.effort] if self.descent is None else self.descent

    def compute_dtype_on(self, device_type: str) -> ComputeDtype:
        """Returns the dtype of the passes on a `cpu` or `cuda` device: `compute_dtype`, or the device's default."""
        return self.compute_dtype or ("bfloat16" if device_type == "cuda" else "float32")


def check_sequences(samples: int, sequence_length: int) -> None:
    """Raises UserError for a number or a length of calibration sequences that no recipe may have."""
    for name, value in (("samples", samples), ("sequence_length", sequence_length)):
        check_least(LEAST[name], **{name: value})


def _spelled_type(entry: str) -> str:
    """Returns an entry of `types`, PATTERN=TYPE, with the type in its one spelling."""
    pattern, equals, type_name = entry.partition("=")
    return f"{pattern}{equals}{spelled(type_name)}"


def _same_fields(recipe: Recipe, settings: type) -> dict[str, Any]:
    return {entry.name: getattr(recipe, entry.name) for entry in dataclasses.fields(settings)}


def plain_type(option: dataclasses.Field[Any]) -> str:
    """Returns the type of an option's value for TOML and the command line: str, int, float, bool or list[str]."""
    name = str(option.type).split(" |")[0]
    return name if name in PLAIN_TYPES else "str"


PLAIN_TYPES = ("str", "int", "float", "bool", "list[str]")


def load_recipe(path: Path) -> dict[str, Any]:
    """Returns the options of a TOML file, for `Recipe(**options)`.

    Raises UserError for an unknown option or a wrong type.
    """
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"Cannot read the recipe {path}: {error}.") from error
    fields = {option.name: option for option in dataclasses.fields(Recipe)}
    for name, value in options.items():
        if name not in fields:
            raise UserError(f"{path}: unknown option {name!r}. Known: {', '.join(fields)}.")
        taken(f"{path}: {name}", value, plain_type(fields[name]))
    return options
