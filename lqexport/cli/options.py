"""The options of `lqexport quantize` as typer reads them: one for each of a recipe's, None where not given."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from lqexport.recipe import Recipe


def _option(name: str, text: str, *declarations: str) -> Any:
    """An option with its help, which ends with the recipe's own default, so that it stands in one place."""
    default = next(field.default for field in dataclasses.fields(Recipe) if field.name == name)
    return typer.Option(*declarations, help=text if default is None else f"{text} [default: {default}]")


Target = Annotated[
    str | None, typer.Option(help="Type of the linears or llama.cpp mix: gguf:Q4_K, gguf:Q4_K_M, gptq:4-g128, exl2.")
]
Method = Annotated[str | None, _option("method", "lean, gptq or rtn.")]
Solver = Annotated[
    str | None,
    _option("solver", "blocked: one order of columns for all rows; exact: each row in its own, for small models."),
]
Calibration = Annotated[
    str | None,
    _option(
        "calibration",
        "Text to calibrate on: python-docs, wikitext2, c4, ptb (any :split), or a .txt or .jsonl file.",
    ),
]
Samples = Annotated[int | None, _option("samples", "Calibration sequences.")]
SequenceLength = Annotated[int | None, _option("sequence_length", "Tokens in each.")]
Seed = Annotated[int | None, _option("seed", "Draws the sequences from the text.")]
Moments = Annotated[
    str | None,
    _option(
        "moments",
        "plain; normalized: each token divided by its norm; guided: weighted by the loss's gradient. [default: "
        "normalized; guided where the prefix is full or types are chosen]",
    ),
]
OutputGroups = Annotated[
    int | None, _option("output_groups", "Runs of a linear's outputs with guided moments of their own.")
]
GuidedPower = Annotated[
    float | None,
    _option("guided_power", "Power of a token's weight in guided moments: lower, fewer tokens rule. GuidedQuant: 1."),
]
Prefix = Annotated[
    str | None,
    _option(
        "prefix",
        "Inputs of a block come from the full or the quantized blocks before. [default: quantized; full for experts, "
        "encoders and linears of more than 16384 inputs]",
    ),
]
ComputeDtype = Annotated[
    str | None,
    _option(
        "compute_dtype",
        "What calibration passes multiply in: float32, or bfloat16 where the hardware is faster at it. "
        "[default: bfloat16 on a GPU, else float32]",
    ),
]
Asymmetric = Annotated[
    bool | None,
    _option(
        "asymmetric",
        "Aim at the full-precision outputs and hidden states, as far as held-out sequences gain. [default: where the "
        "prefix is quantized]",
        "--asymmetric/--symmetric",
    ),
]
Smooth = Annotated[
    bool | None,
    _option(
        "smooth",
        "Scale columns of linears, and the norms before them by the inverse, so that inputs round better to 8 bits. "
        "LoRA adapters trained on the source do not fit such a file. [default: for GGUF types of 4 bits or more]",
        "--smooth/--no-smooth",
    ),
]
Dampening = Annotated[
    float | None,
    _option(
        "dampening",
        "Added to the diagonal of the second moments, as a share of its mean. [default: half of its median]",
    ),
]
Importance = Annotated[str | None, _option("importance", "What weighs errors: diagonal, cholesky or inverse.")]
Exponent = Annotated[float | None, _option("exponent", "Power of the importance.")]
ActOrder = Annotated[
    bool | None, _option("act_order", "Solve columns by falling activation.", "--act-order/--no-act-order")
]
Descent = Annotated[int | None, _option("descent", "Sweeps of coordinate descent after error feedback.")]
Tune = Annotated[
    int | None,
    _option("tune", "Sequences to tune norms and stored scales on, end to end; 0: none. [default: 64 for method lean]"),
]
TuneRate = Annotated[
    float | None, _option("tune_rate", "Largest relative change of a tuned number in a step, where the KL is 1 nat.")
]
Rank = Annotated[int | None, _option("rank", "Rank of the low-rank correction of each linear; 0 for none.")]
Scaling = Annotated[
    str | None, _option("scaling", "What the correction weighs errors by: lqer, l2qer, qera-diag or qera.")
]
LowRankFactors = Annotated[
    str | None, _option("factors", "Type of the correction's factors: F16, BF16, F32, Q8_0, native:mxint-8-g16.")
]
FactorBytes = Annotated[
    int | None,
    _option("factor_bytes", "Share so many bytes among the linears, at most --rank each; 0: the same rank for all."),
]
Rounds = Annotated[int | None, _option("rounds", "How often codes and correction are solved for in turn.")]
Merge = Annotated[
    bool | None,
    _option("merge", "Solve the corrected weights into the format again, and store no factors.", "--merge/--no-merge"),
]
EmbeddingType = Annotated[str | None, _option("embedding_type", "Type of the embedding, such as Q6_K.")]
OutputType = Annotated[str | None, _option("output_type", "Type of the output, such as Q6_K.")]
Types = Annotated[
    list[str] | None,
    typer.Option("--type", help="Type for the tensors of a name pattern: '*.down_proj.weight=Q6_K'. May repeat."),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="With --target gguf:auto: choose each tensor's type so that all tensors together take at most 4.25bpw, "
        "3.9GB, 700MiB, or what a target such as Q4_K_M takes, and the model loses least."
    ),
]
Fallback = Annotated[
    bool | None,
    _option("fallback", "Whether a shape that a type cannot hold may take another type.", "--fallback/--no-fallback"),
]
Bits = Annotated[float | None, _option("bits", "Target exl2: bits per weight of the linears on average, such as 3.5.")]
HeadBits = Annotated[int | None, _option("head_bits", "Target exl2: width of the output's codes; 16 for float16.")]
