"""Wrong files over several families are failed by `verify` with its default limits, and right ones are not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rewritten_files import rewritten
from spoiled_files import CLASSES, gguf_file, save_sharp
from wrong_files import WRONG

from lqexport.calibration.texts import read_text
from lqexport.errors import UserError
from lqexport.verification.verifying import verify

TARGETS = ("F16", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the folder of a family's model."""
    folder, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def model(family: str) -> Path:
        if family not in made:
            made[family] = save_sharp(folder / family, family, tiny_model)
        return made[family]

    return model


@pytest.fixture(scope="module")
def right(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that returns a family's right file in a type."""
    made: dict[tuple[str, str], Path] = {}

    def file(family: str, target: str) -> Path:
        if (family, target) not in made:
            folder = tmp_path_factory.mktemp("right")
            made[family, target] = gguf_file(models(family), folder, f"gguf:{target}")
        return made[family, target]

    return file


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text("python-heldout").content[:8_000], encoding="utf-8")
    return str(path)


def said_of(file: Path, model: Path, text: str) -> list[str]:
    """Returns what `verify` says of a file by default: why it fails and what is likely. Empty if it passes."""
    try:
        result = verify(file, str(model), text=text, windows=1, max_perplexity_ratio=2.0)
    except UserError as error:  # the command ends with exit status 2
        return [str(error)]
    return [*result.failed, *result.causes]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_fails(
    name: str, models: Callable[[str], Path], right: Callable[[str, str], Path], heldout: str, tmp_path: Path
) -> None:
    wrong = WRONG[name]
    if wrong.change:
        path = gguf_file(models(wrong.family), tmp_path, f"gguf:{wrong.target}", wrong.change)
    else:
        path = rewritten(
            right(wrong.family, wrong.target), tmp_path / "model.gguf", wrong.spoil or (lambda content: None)
        )
    if wrong.bytes:
        wrong.bytes(path)
    said = said_of(path, models(wrong.family), heldout)
    assert said, "passed"
    assert [sentence for sentence in said if wrong.said in sentence], said


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_right_file_passes(
    family: str, target: str, models: Callable[[str], Path], right: Callable[[str, str], Path], heldout: str
) -> None:
    assert said_of(right(family, target), models(family), heldout) == []


def test_the_page_has_the_counts(root: Path) -> None:
    page = " ".join((root / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    counts = re.search(r"makes (\d+) wrong files from (\d+) right ones", page)
    assert counts
    assert (int(counts[1]), int(counts[2])) == (len(WRONG), len(CLASSES) * len(TARGETS))
