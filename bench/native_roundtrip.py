"""Loads, saves and reloads native folders of real models, and checks that the logits are those of `verify`.

    python bench/reference_models.py .models
    python bench/native_roundtrip.py .models/smollm2 .models/smollm2-k

The folders have tables of 2, 3 and 4 bits, with and without low-rank corrections. Weights are rounded to nearest, which
takes about a minute each; the check does not depend on how codes were chosen. `verify` runs a model block by block from
decoded weights, and transformers runs it as a whole from packed weights. Both run the same tokens in float32, and the
logits are compared bit by bit. The generated tokens are compared too. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

import lqexport
from lqexport.calibration.texts import read_text
from lqexport.models.adapters import corrected, open_factors
from lqexport.models.blocks import BlockModel
from lqexport.models.inspect import bits, inspect
from lqexport.models.written import open_export

TOKENS, RANK = 64, 16


def verifiers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits [1, tokens, vocabulary] as `verify` computes them, from the files alone."""
    export = open_export(folder)
    factors = open_factors(folder, None, export.config)
    model = BlockModel(corrected(export, factors))
    hidden = model.start(ids)
    for _, block in model.blocks():
        hidden = model.run(block, hidden)
    return model.logits(hidden)


def made(source: Path, width: int, rank: int, work: Path) -> Path:
    """Makes the native folder with tables of `width` bits and returns its path."""
    options = {"method": "rtn", "rank": rank, "scaling": "lqer", "moments": "plain", "samples": 2, "tune": 0}
    recipe = lqexport.Recipe(str(source), f"native:table-{width}", sequence_length=64, **options)
    lqexport.quantize(recipe, work / "artifact", device="cpu")
    return lqexport.export(work / "artifact", work / "folder")


def generated(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """Generates eight more tokens greedily and returns them."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@torch.no_grad()
def checked(source: Path, width: int, rank: int) -> list[object]:
    """Makes and checks one folder. Returns its table row."""
    with tempfile.TemporaryDirectory() as place:
        folder = made(source, width, rank, Path(place))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(read_text("python-heldout").content[:2000], return_tensors="pt")["input_ids"][:, :TOKENS]
        model = lqexport.load(folder, dtype=torch.float32)
        logits, text = model(ids).logits, generated(model, ids)
        model.save_pretrained(Path(place) / "again")
        again = lqexport.load(Path(place) / "again", dtype=torch.float32)
        return [
            source.name, width, rank, f"{bits(inspect(folder).entries):.3f}",
            *(same(logits, expected) for expected in (verifiers_logits(folder, ids), again(ids).logits)),
            "the same" if generated(again, ids) == text else "others",
        ]  # fmt: skip


def same(logits: torch.Tensor, expected: torch.Tensor) -> str:
    """Returns "the same" if all bits are equal, otherwise the largest difference."""
    return "the same" if torch.equal(logits, expected) else f"{float((logits - expected).abs().max()):.1e} off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    print("| model | bits | rank | bits per weight | logits of verify | logits reloaded | text reloaded |")
    print("|---|---|---|---|---|---|---|")
    for source in parser.parse_args().models:
        for rank in (0, RANK):
            for width in (2, 3, 4):
                print("|", " | ".join(map(str, checked(source, width, rank))), "|", flush=True)


if __name__ == "__main__":
    main()
