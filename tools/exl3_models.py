"""Lists which architectures ExLlamaV3 runs as this program does: their models, written as EXL3 folders and run there.

    python tools/exl3_models.py [CASE ...]

Each case of tests/helpers/family_cases.py is a small random model, here of 128 columns. It is written as an EXL3
folder with random linears, loaded by ExLlamaV3's own Python code on the CPU (tests/helpers/exllamav3_on_cpu.py has
functions in the place of its kernels), and run on 60 tokens. Its logits are compared with those of this program's own
forward of the same folder. A line has the case, its model type, and the largest difference between the logits over
their standard deviation, or why there is none. `converters/exl3/support.py` has the model types that pass.

It needs `pip install exllamav3 --no-deps`, `marisa_trie` and `llguidance` in an environment with lqexport.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

import exllamav3_on_cpu
from family_cases import CASES, make_model, make_tokenizer
from random_exl3 import random_artifact

from lqexport.converters.exl3 import plan, writer
from lqexport.models.blocks import BlockModel
from lqexport.models.written import open_export
from lqexport.recipe import Recipe

WIDE = {"hidden_size": 128, "num_attention_heads": 8, "n_embd": 128}
"""Sizes in place of those of the cases: ExLlamaV3 runs no gated MLP beside hidden states of 64 columns."""
SPLIT = {"num_key_value_heads": 8, "intermediate_size": 128}
"""The same for Phi-3, whose linears are split at multiples of 128."""
TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 59))]


def largest_difference(name: str, folder: Path) -> float:
    """Returns the largest difference of logits between ExLlamaV3 and this program, over their standard deviation."""
    config_class, options, tokenizer = CASES[name]
    wide = WIDE | (SPLIT if name.startswith(("phi", "glm4")) else {})
    CASES[name] = config_class, options | {key: size for key, size in wide.items() if key in options}, tokenizer
    make_model(name).half().save_pretrained(folder / "source")
    make_tokenizer("llama-bpe", folder).save_pretrained(folder / "source")
    with mock.patch.object(plan, "check_supported"), mock.patch.object(writer, "check_supported"):
        artifact = random_artifact(Recipe(str(folder / "source"), "exl3:4"), folder / "artifact")
        writer.write(artifact, folder / "written")
    model = BlockModel(open_export(folder / "written"))
    state = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        state = model.run(block, state)
    ours = model.logits(state)[0]
    theirs = exllamav3_on_cpu.logits(exllamav3_on_cpu.load(folder / "written"), TOKENS)[:, : ours.shape[1]]
    return float((ours - theirs).abs().max() / ours.std())


def model_type(name: str) -> str:
    return getattr(transformers, CASES[name][0]).model_type


def main() -> None:
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            try:
                result = f"{largest_difference(name, Path(folder)):.2g}"
            except Exception as error:  # whatever stops a model is the result
                result = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{name:24} {model_type(name):20} {result}", flush=True)


if __name__ == "__main__":
    main()
