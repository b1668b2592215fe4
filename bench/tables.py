"""Compares non-uniform tables (LeanQuant's grid) with GPTQ and plain rounding at the same bits, and two k-means.

    python bench/tables.py MODEL --calibration FILE --evaluation FILE [--samples 32] [--windows 6] [--every 1]

Second moments are collected once, from the full-precision prefix. Every method then quantizes the linears of the
decoder blocks (with --every N, of every N-th block) to a table of 2^bits float16 values per row. RTN and GPTQ take
evenly spaced tables over a row's range, and lean fits them by exact weighted k-means. A float32 forward pass compares
each result with the source in windows of 512 tokens, whose second half is scored. Last, the script compares the
objective and the time of exact k-means with scikit-learn's, with the settings of LeanQuant's released code, on rows of
one linear. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from common import comparison_parser
from judging import windows_of
from sklearn.cluster import KMeans
from transformers import AutoModelForCausalLM

from lqexport.calibration.moments import SecondMoments
from lqexport.calibration.sequences import load_calibration
from lqexport.evaluation import evaluate
from lqexport.evaluation.protocols import LLAMACPP_512
from lqexport.formats.registry import codec_named
from lqexport.kernels.kmeans import weighted_kmeans
from lqexport.models.source import open_source
from lqexport.recipe import Recipe
from lqexport.solver.cholesky import factorize
from lqexport.solver.importance import importance
from lqexport.solver.linear import solve_linear

METHODS = {
    "RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "lean as released (U^-4), one pass": {"importance": "cholesky", "exponent": 4.0, "descent": 0, "dampening": 0.1},
    "lean, diag(H), one pass": {"descent": 0},
    "lean, diag(H), with descent": {},
}


def gather(model: torch.nn.Module, tokens: torch.Tensor, every: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns plain and normalized second moments by linear. Linears with the same input are computed separately."""
    moments = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name and int(name.split(".")[2]) % every == 0:
            pair = [
                SecondMoments(module.in_features, moments_type, torch.device("cpu"))
                for moments_type in ("plain", "normalized")
            ]
            moments[name] = pair
            module.register_forward_pre_hook(lambda _, args, pair=pair: [total.add(args[0]) for total in pair] and None)
    for ids in tokens.split(2):
        model.model(ids, use_cache=False)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return {name: tuple(total.hessian() for total in pair) for name, pair in moments.items()}


def quantize_all(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], moments: dict, bits: int, recipe: Recipe
) -> float:
    """Replaces every linear's weight by its quantized values. Returns the seconds."""
    began = time.perf_counter()
    table = codec_named(f"native:table-{bits}")
    for name, weight in weights.items():
        hessian = None if recipe.method == "rtn" else moments[name][recipe.moments == "normalized"]
        solved = solve_linear(name, weight, hessian, table.name, recipe.solver_settings)
        model.get_submodule(name).weight.data = torch.from_numpy(table.decode(solved.planes, weight.shape[1]))
    return time.perf_counter() - began


def logits(model: torch.nn.Module, windows: np.ndarray) -> list[torch.Tensor]:
    """Returns the logits that predict the second half of each window."""
    return [model(torch.from_numpy(window)[None]).logits[0, 256:-1] for window in windows]


def methods_table(arguments: argparse.Namespace) -> None:
    """Quantizes and judges by every method, and prints both tables."""
    source = open_source(arguments.model)
    tokens = load_calibration(
        arguments.calibration, source.tokenizer(), samples=arguments.samples, sequence_length=512, seed=0
    ).tokens
    windows = windows_of(source, arguments.evaluation, arguments.windows)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    reference = logits(model, windows)
    moments = gather(model, tokens, arguments.every)
    weights = {name: model.get_submodule(name).weight.data for name in moments}
    print("| bits | method | mean KL | perplexity | same top-1 | solve s |\n|---|---|---|---|---|---|")
    for bits in (4, 3, 2):
        for label, options in METHODS.items():
            recipe = Recipe(arguments.model, f"native:table-{bits}", moments=arguments.moments, **options)
            seconds = quantize_all(model, weights, moments, bits, recipe)
            result = evaluate.compare(reference, logits(model, windows), windows, LLAMACPP_512)
            print(f"| {bits} | {label} | {result.kl:.4f} ± {result.kl_error:.4f} | {result.perplexity:.2f} | "
                  f"{result.top1:.1%} | {seconds:.0f} |", flush=True)  # fmt: skip
    kmeans_table(weights, moments, arguments.rows)


def kmeans_table(weights: dict[str, torch.Tensor], moments: dict, rows: int) -> None:
    """Prints exact k-means beside scikit-learn's, with weights U_ii^-4 from the plain Hessian as LeanQuant has."""
    name = next(name for name in reversed(weights) if name.endswith("mlp.gate_proj"))
    hessian = moments[name][0]
    cholesky = factorize(hessian, 0.1, True)
    weight = importance(hessian, cholesky, "cholesky", 4.0).double().numpy()
    values = weights[name][:rows].double().numpy()
    weighted_kmeans(values[:1], weight, 4)  # compiles the kernel before it is timed
    print(f"\nk-means on {rows} rows of {name}, weights U_ii^-4:\n")
    print("| bits | exact: s | scikit-learn: s | scikit-learn's objective / exact |\n|---|---|---|---|")
    for bits in (4, 3, 2):
        began = time.perf_counter()
        _, exact = weighted_kmeans(values, weight, 2**bits)
        middle = time.perf_counter()
        theirs = np.array([lloyd(row, weight, 2**bits) for row in values])
        seconds = middle - began, time.perf_counter() - middle
        print(f"| {bits} | {seconds[0]:.3f} | {seconds[1]:.2f} | {theirs.sum() / exact.sum():.3f} |", flush=True)


def lloyd(row: np.ndarray, weight: np.ndarray, count: int) -> float:
    """Returns scikit-learn's objective with LeanQuant's settings: an even start up to 8 centers, k-means++ above."""
    even = np.linspace(row.min(), row.max(), count)[:, None]
    start = {"init": even, "n_init": 1} if count <= 8 else {"init": "k-means++", "n_init": "auto"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns if there are fewer distinct clusters than asked for
        return KMeans(count, max_iter=100, tol=1e-6, random_state=0, **start).fit(row[:, None], None, weight).inertia_


def main() -> None:
    parser = comparison_parser(__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--moments", default="normalized")
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args()
    with torch.no_grad():
        methods_table(arguments)


if __name__ == "__main__":
    main()
