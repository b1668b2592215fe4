"""Measures what each step of the solver gains: compares named variants of the recipe for several models and targets.

    python bench/ablation.py MODEL... --calibration FILE --evaluation FILE [FILE...] --work FOLDER
                             [--targets gguf:Q2_K ...] [--variants NAME ...] [--samples 64] [--windows 12]
                             [--device cuda]

Every variant is quantized from the same calibration sequences. lqexport's own float32 forward pass judges it on each
evaluation text, in windows of 512 tokens whose second half is scored. Give texts of other domains too. The variants
share the second moments in FOLDER/cache, and finished artifacts are reused. Prints a Markdown table per model and
target. The seconds are those of `quantize` alone, without second moments if the cache had them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from judging import Judge

from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.runtime.environment import choose_device

UNTUNED: dict[str, Any] = {"tune": 0}
ONE_PASS: dict[str, Any] = {"descent": 0, "tune": 0}
GUIDED: dict[str, Any] = {"moments": "guided", "prefix": "full"}
NORMALIZED: dict[str, Any] = {"moments": "normalized", "prefix": "full"}
PLAIN: dict[str, Any] = {"moments": "plain", "prefix": "full"}
SYMMETRIC: dict[str, Any] = {"prefix": "quantized", "asymmetric": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq", **PLAIN},
    "as-released": {"moments": "plain", **SYMMETRIC, "importance": "cholesky", "exponent": 4.0, "dampening": 0.1,
                    **ONE_PASS},
    "plain": PLAIN | ONE_PASS,
    "normalized": NORMALIZED | ONE_PASS,
    "guided": GUIDED | ONE_PASS,
    "guided-4-groups": GUIDED | {"output_groups": 4, **ONE_PASS},
    "quantized-prefix": SYMMETRIC | {"moments": "normalized", **ONE_PASS},
    "asymmetric": ONE_PASS,
    "asymmetric+descent": UNTUNED,
    "asymmetric+guided+descent": {"moments": "guided", **UNTUNED},
    "guided^1+descent": GUIDED | {"guided_power": 1.0, **UNTUNED},
    "guided^0.75+descent": GUIDED | {"guided_power": 0.75, **UNTUNED},
    "guided^0.25+descent": GUIDED | {"guided_power": 0.25, **UNTUNED},
    "guided+descent": GUIDED | UNTUNED,
    "normalized+descent+tune": NORMALIZED,
    "guided+descent+tune": GUIDED,
    "default": {},
}  # fmt: skip
"""The options of each variant.

`as-released` is the recipe of LeanQuant's repository, but with exact k-means instead of its approximate one. `guided^P`
has the power P of the tokens' weights instead of the default. `default` is asymmetric calibration with descent and
tuning."""


def rows(model: str, target: str, judges: list[Judge], arguments: argparse.Namespace) -> list[str]:
    """Quantizes and judges every variant. Returns a table row for each."""
    lines = []
    for name in arguments.variants:
        recipe = Recipe(model, target, calibration=arguments.calibration, samples=arguments.samples,
                        seed=arguments.seed, compute_dtype=arguments.compute_dtype, **VARIANTS[name])  # fmt: skip
        out = arguments.work / f"{Path(model).name}-{target.replace(':', '-')}-{name}-{arguments.samples}"
        began = time.perf_counter()
        quantize(recipe, out, device=arguments.device, cache=arguments.work / "cache")
        seconds = time.perf_counter() - began
        results = [judge(open_export(out)) for judge in judges]
        cells = [f"{r.kl:.4f} ± {r.kl_error:.4f} | {r.perplexity:.2f} ± {r.perplexity_error:.2f}" for r in results]
        lines.append(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=["gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_K"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--compute-dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tables = []
    for model in arguments.models:
        options = arguments.windows, choose_device(arguments.device)
        judges = [Judge(open_source(model), text, *options) for text in arguments.evaluation]
        for target in arguments.targets:
            head = "".join(f" KL, {Path(text).stem} | perplexity |" for text in arguments.evaluation)
            title = [
                f"{Path(model).name}, {target}",
                "",
                f"| variant |{head} s |",
                "|---" * (2 + 2 * len(judges)) + "|",
            ]
            tables.append("\n".join([*title, *rows(model, target, judges, arguments)]))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
