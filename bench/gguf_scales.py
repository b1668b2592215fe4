"""Measures which matrices llama.cpp multiplies by a further scale (`X.scale`), for a random model of each architecture.

    python bench/gguf_scales.py [CASE ...]

The logits of a file with scales are compared with those of a file whose weights are multiplied by them. The scales are
negative, since norms hide the size of what enters them, but not its sign. Prints the matrices of a block that llama.cpp
multiplies, those that it does not, and those for which it loads no scale (`converters/gguf/scales.py` has the table).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from lqexport.converters.gguf.scales import scale_name
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.recipe import Recipe

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
from family_cases import CASES, architecture_of_case, export, make_model, make_tokenizer, train_pieces
from rewritten_files import Content, content_of, rewritten

FLOAT32 = GGMLQuantizationType.F32
TOKENS = [1, *range(3, 443, 22)]


def f32_file(case: str, folder: Path, pieces: Path) -> Path:
    """Writes the model of a case as a GGUF file in F32, and returns the file."""
    make_model(case).save_pretrained(folder / "hf")
    make_tokenizer(CASES[case][2], pieces).save_pretrained(folder / "hf")
    return export(folder, Recipe(str(folder / "hf"), "gguf:F32"))


def matrices_of(file: Path) -> dict[str, list[str]]:
    """Returns the names of the tensors in which a file has each matrix of its blocks, such as attn_q."""
    content, matrices = content_of(file), dict[str, list[str]]()
    for name, data in content.tensors.items():
        match = re.fullmatch(r"blk\.\d+\.(.+)\.weight", name)
        if match and data.ndim > 1 and content.forms[name] == FLOAT32:
            matrices.setdefault(match[1], []).append(name)
    return matrices


def are_applied(file: Path, names: Collection[str]) -> bool | None:
    """Returns whether llama.cpp multiplies the tensors of an F32 file by further scales; None if it does not load them.

    The files that are compared are written beside `file`.
    """
    tensors, random = content_of(file).tensors, np.random.default_rng(1)
    counts = {name: len(tensors[name]) if tensors[name].ndim == 3 else 1 for name in names}
    scales = {name: -random.uniform(0.5, 2, count).astype(np.float32) for name, count in counts.items()}

    def with_scales(content: Content) -> None:
        for name, scale in scales.items():
            content.tensors[scale_name(name)], content.forms[scale_name(name)] = scale, FLOAT32

    def multiplied(content: Content) -> None:
        for name, scale in scales.items():
            content.tensors[name] = content.tensors[name] * scale.reshape(-1, *[1] * (tensors[name].ndim - 1))

    plain, expected = _logits(file), _logits(rewritten(file, file.with_name("multiplied.gguf"), multiplied))
    try:
        actual = _logits(rewritten(file, file.with_name("scaled.gguf"), with_scales))
    except UserError:
        return None
    return bool(np.abs(actual - expected).mean() < 0.01 * np.abs(plain - expected).mean())


def _logits(file: Path) -> np.ndarray:
    with LlamaCpp(file, 32, threads=1) as llama:
        return llama.logits(TOKENS)


def measure(case: str, pieces: Path) -> None:
    """Prints a line on the matrices of one case."""
    with tempfile.TemporaryDirectory() as folder:
        file = f32_file(case, Path(folder), pieces)
        found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
        for matrix, names in matrices_of(file).items():
            found[are_applied(file, names)].append(matrix)
    columns = (" ".join(found[key]) or "-" for key in (True, False, None))
    print("|".join((case, str(architecture_of_case(case).gguf), *columns)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    pieces = Path(tempfile.mkdtemp())
    train_pieces(pieces)
    print("case|architecture|multiplied|not multiplied|not loaded")
    for case in parser.parse_args().cases:
        if not (child := os.fork()):  # llama.cpp may end the process
            measure(case, pieces)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(f"{case}|llama.cpp or the export failed")
    shutil.rmtree(pieces)


if __name__ == "__main__":
    main()
