"""The model card of a verified file, in Markdown: what was measured, how the file was made, and how to use it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lqexport.storage.files import written_whole
from lqexport.target import Target
from lqexport.verification.report import checks, flat, measures, verdict
from lqexport.verification.result import Verification

USE = {
    "gguf": "    llama-cli -m {name} -p 'Hello'",
    "exl2": "    # a folder for ExLlamaV2 and what builds on it, such as TabbyAPI",
    "native": "    import lqexport  # pip install lqexport\n    model = lqexport.load('{name}', device_map='auto')",
}
"""Target family -> the lines that show how to run the model."""
SMOOTHED = (
    "Norms and rows are scaled, and the columns of the linears behind them by the inverse, so that inputs round "
    "better. The model is the same, but LoRA adapters that were trained on the source do not fit this file."
)
"""The paragraph of a smoothed model's card."""


def save_card(result: Verification, path: Path) -> None:
    """Writes the model card to `path`, whole or not at all."""
    with written_whole(path) as file:
        file.write(card(result).encode())


def card(result: Verification) -> str:
    """Returns the model card of a verified file, beginning with the front matter that the Hugging Face hub reads."""
    recipe: dict[str, Any] = result.run.get("recipe", {})
    family = Target.parse(str(recipe.get("target", "gguf"))).family
    name = Path(result.file).name
    title = ["---", *_base_model(result.against), "tags: [quantized, lqexport]", "---", "", f"# {name}", ""]
    about = [f"{result.against}, quantized with lqexport; verified from the written file: **{verdict(result)}**.", ""]
    lines = [*title, *about, *_sentences(result), "## Measured", "", *_measured(result), ""]
    lines += ["## Use", "", USE.get(family, USE["gguf"]).format(name=name), ""]
    lines += [SMOOTHED, ""] if result.smoothed else []
    facts = [*checks(result), ("sha256", result.sha256), ("sha256 of the text", result.text_sha256)]
    facts += [(f"version of {package}", version) for package, version in result.versions.items()]
    lines += ["## File", "", *_table(["", ""], [[label, value] for label, value in facts]), ""]
    if recipe:
        lines += ["## Recipe", "", *_table(["option", "value"], [list(line) for line in flat(recipe)]), ""]
    return "\n".join(lines)


def _base_model(source: str) -> list[str]:
    """Returns the front matter's line for the base model; none for a local source: the hub refuses a base model that is
    not a repository id."""
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not Path(source).exists()
    return [f"base_model: {source}"] if is_id else []


def _sentences(result: Verification) -> list[str]:
    likely = [f"Likely: {sentence}" for sentence in result.causes]
    lines = [f"- {sentence}" for sentence in (*result.failed, *likely, *result.warnings)]
    return [*lines, ""] if lines else []


def _measured(result: Verification) -> list[str]:
    if not result.columns:
        return ["Nothing: the file could not be run."]
    lines = _table(
        ["", *(title for title, _ in result.columns)], [[label, *values] for label, values in measures(result)]
    )
    return [*lines, "", f"On the text {result.text}, in {result.engine}. ± is one standard error."]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table. Bars in cells are escaped, and line ends become spaces."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]
