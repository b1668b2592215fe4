"""Makes one quantized model by one tool, in a process whose processor seconds `bench/peers.py` measures.

    PYTHON bench/peers_make.py TOOL MODEL TOKENS OUT

TOKENS is a .npy file of token ids [sequences, length], on which every tool calibrates. Each tool is imported where it
is used, so PYTHON needs no other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MIX = "Q4_K_S"
"""The mix of GGUF types that all tools make. AutoRound's Q6_K of rows that are zero, which Q4_K_M needs in the padded
smollm2-k, is not a number."""


def bare_passes(model: str, tokens: np.ndarray, out: Path) -> None:
    """Runs the model once over the tokens, in float32, four sequences at a time; writes nothing."""
    from transformers import AutoModelForCausalLM

    blocks = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    with torch.no_grad():
        for part in torch.from_numpy(tokens).split(4):
            blocks(part)


def llama_quantize(model: str, tokens: np.ndarray, out: Path) -> None:
    """llama.cpp's quantizer, with an importance matrix of the same tokens, by way of lqexport's F16 file and passes."""
    from lqexport.calibration.make_imatrix import make_imatrix
    from lqexport.converters.gguf import writer
    from lqexport.evaluation import llamacpp_quantizer
    from lqexport.pipeline.quantize import quantize
    from lqexport.recipe import Recipe
    from lqexport.storage.artifact import Artifact

    half, artifact, matrix = (out.with_suffix(ending) for ending in (".F16", ".artifact", ".imatrix"))
    quantize(Recipe(model, "gguf:F16", method="rtn"), artifact)
    writer.write(Artifact(artifact), half)
    samples, length = tokens.shape
    make_imatrix(model, matrix, calibration=text_beside(out), samples=samples, sequence_length=length, device="cpu")
    llamacpp_quantizer.quantize(half, out, MIX, imatrix=matrix)
    half.unlink()


def text_beside(out: Path) -> str:
    """The file of the text that TOKENS were drawn from, with the seed that lqexport's commands have by default."""
    return str(out.with_name("calibration.txt"))


def autoround(model: str, tokens: np.ndarray, out: Path, iters: int | None) -> None:
    """AutoRound; with `iters` 0 its rounding without training, by default 200 steps a block."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sequences: Any = torch.utils.data.DataLoader(torch.from_numpy(tokens), batch_size=8)
    rounder = AutoRound(
        loaded, AutoTokenizer.from_pretrained(model), scheme=f"gguf:{MIX.lower()}", iters=iters, nsamples=len(tokens),
        seqlen=tokens.shape[1], dataset=sequences, device_map="cpu",
    )  # fmt: skip
    folder = out.with_suffix(".autoround")
    rounder.quantize_and_save(str(folder), format=f"gguf:{MIX.lower()}")
    (file,) = folder.rglob("*.gguf")
    file.replace(out)


def gptqmodel(model: str, tokens: np.ndarray, out: Path) -> None:
    """GPTQModel, 4 bits, groups of 128, as a folder in GPTQ's layout."""
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=128), device="cpu")
    loaded.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()], batch_size=4)
    loaded.save(str(out))


def lqexport_run(model: str, tokens: np.ndarray, out: Path, target: str, effort: Any) -> None:
    """lqexport, into a GGUF file or a folder in GPTQ's layout."""
    from lqexport.exporting import export
    from lqexport.pipeline.quantize import quantize
    from lqexport.recipe import Recipe

    samples, length = tokens.shape
    recipe = Recipe(model, target, samples=samples, sequence_length=length, effort=effort,
                    calibration=text_beside(out))  # fmt: skip
    artifact = out.with_suffix(".artifact")
    quantize(recipe, artifact)
    export(artifact, out)


MAKERS: dict[str, Callable[[str, np.ndarray, Path], None]] = {
    "bare forward passes": bare_passes,
    "llama-quantize, imatrix": llama_quantize,
    "AutoRound, iters 0": lambda *given: autoround(*given, iters=0),
    "AutoRound": lambda *given: autoround(*given, iters=None),
    "lqexport, fast": lambda *given: lqexport_run(*given, f"gguf:{MIX}", "fast"),
    "lqexport": lambda *given: lqexport_run(*given, f"gguf:{MIX}", "default"),
    "lqexport, best": lambda *given: lqexport_run(*given, f"gguf:{MIX}", "best"),
    "GPTQModel": gptqmodel,
    "lqexport, GPTQ's layout": lambda *given: lqexport_run(*given, "gptq:4-g128-sym", "default"),
}
"""Name -> what makes a model by it."""

if __name__ == "__main__":
    tool, model_name, tokens_file, out_name = sys.argv[1:]
    MAKERS[tool](model_name, np.load(tokens_file), Path(out_name))
