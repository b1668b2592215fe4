"""Lists which architectures mlx-lm runs as this program does: their models, written as MLX folders and run in mlx-lm.

    python tools/mlx_models.py [CASE ...]

Each case of tests/helpers/family_cases.py is a small random model. It is rounded to 8 bits, written as an MLX folder,
loaded by mlx_lm.load and run on 60 tokens in float32. Its logits are compared with those of this program's own
decoding of the same folder. A line has the case, mlx-lm's model type, and the largest difference between the logits
over their standard deviation, or why there is none. `converters/mlx/support.py` has the model types that pass.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))

from family_cases import CASES, make_model, make_tokenizer

from lqexport.converters.mlx import writer
from lqexport.evaluation.mlx_lm import MlxLm
from lqexport.models.blocks import BlockModel
from lqexport.models.written import open_export
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact

TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 59))]


def largest_difference(name: str, folder: Path) -> float:
    """Returns the largest difference of logits between mlx-lm and this program, over their standard deviation."""
    make_model(name).bfloat16().save_pretrained(folder / "source")
    make_tokenizer("llama-bpe", folder).save_pretrained(folder / "source")
    quantize(Recipe(str(folder / "source"), "mlx:8-g32", method="rtn"), folder / "artifact", device="cpu")
    writer.write(Artifact(folder / "artifact"), folder / "written")
    model = BlockModel(open_export(folder / "written"))
    state = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        state = model.run(block, state)
    ours = model.logits(state)[0].numpy()
    theirs = MlxLm(folder / "written").logits(TOKENS)
    return float(np.abs(ours - theirs).max() / ours.std())


def main() -> None:
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            try:
                with mock.patch("lqexport.converters.mlx.support.MODEL_TYPES", None):
                    result = f"{largest_difference(name, Path(folder)):.2g}"
            except Exception as error:  # whatever stops a model is the result
                result = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name:24} {make_model(name).config.model_type:20} {result}", flush=True)


if __name__ == "__main__":
    main()
