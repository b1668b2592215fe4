"""The model card of a verified file, in Markdown: what was measured, how the file was made, and how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from lqexport.sizes import human_bytes
from lqexport.storage.files import written_whole
from lqexport.storage.published import is_hub_id
from lqexport.verification.report import checks, flat, measures, verdict
from lqexport.verification.result import Verification
from lqexport.verification.usage import INSTALL, LIBRARIES, card_lines

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
    """Returns the model card of a verified file, beginning with the front matter that the Hugging Face hub reads.

    It names no path of this machine.
    """
    result = result.published()
    family, model = result.family, result.against.rpartition("/")[2].removesuffix(".gguf")
    adapter = result.adapter if result.adapter != result.file else None
    task = "feature-extraction" if result.similarity else "text-generation"
    head = front_matter(result.against, result.license, result.family, task)
    lines = [*head, "", f"# {model}, {result.target}", ""]
    lines += [f"{result.against}, quantized with [lqexport]({INSTALL}) into {result.target}: `{result.file}`.", ""]
    lines += [f"Verified from the written file: **{verdict(result)}**.", "", *_sentences(result)]
    lines += ["## Measured", "", *_measured(result), ""]
    lines += ["## Use", "", *card_lines(result.file, family, adapter, encoder=result.similarity is not None), ""]
    lines += [SMOOTHED, ""] if result.smoothed else []
    facts = [*checks(result), ("sha256", result.sha256), ("sha256 of the text", result.text_sha256)]
    facts += [(f"version of {package}", version) for package, version in result.versions.items()]
    lines += ["## File", "", *markdown_table(["", ""], [[label, value] for label, value in facts]), ""]
    if recipe := result.run.get("recipe"):
        lines += ["## Recipe", "", *markdown_table(["option", "value"], [list(line) for line in flat(recipe)]), ""]
    return "\n".join(lines)


def front_matter(against: str, license: dict[str, str], family: str, task: str) -> list[str]:
    """Returns the lines that the hub reads at the top of a card.

    against   the public name of the source. A local one gets no base model: the hub refuses what is no repository id.
    license   what the source says of its license
    family    of the target
    task      the hub's name of what the model does
    """
    entries = {name: json.dumps(value, ensure_ascii=False) for name, value in license.items()}
    if is_hub_id(against):
        entries |= {"base_model": against, "base_model_relation": "quantized"}
    entries["library_name"] = LIBRARIES.get(family, "transformers")
    entries["pipeline_tag"] = task
    entries["tags"] = f"[quantized, lqexport, {family}]"
    return ["---", *(f"{name}: {value}" for name, value in entries.items()), "---"]


def _sentences(result: Verification) -> list[str]:
    likely = [f"Likely: {sentence}" for sentence in result.causes]
    lines = [f"- {sentence}" for sentence in (*result.failed, *likely, *result.warnings)]
    return [*lines, ""] if lines else []


def _measured(result: Verification) -> list[str]:
    if not result.columns:
        return ["Nothing: the file could not be run."]
    head = ["", *(title for title, _ in result.columns)]
    size = [f"{human_bytes(result.nbytes)}, {result.bits_per_weight:.3f} bits per weight"] * len(result.columns)
    types = ["type", *[result.target] * len(result.columns)]
    lines = markdown_table(head, [types, ["size", *size], *([label, *values] for label, values in measures(result))])
    return [*lines, "", f"On the text {result.text}, in {result.engine}. ± is one standard error."]


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table. Bars in cells are escaped, and line ends become spaces."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'---|' * len(head)}", *lines[1:]]
