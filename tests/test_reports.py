"""Reports of a verification: terminal, JSON, HTML page and model card."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from verified_models import DOWN, not_finite
from verified_models import found as found
from verified_models import lossy as lossy
from verified_models import lossy_file as lossy_file
from verified_models import text as text

from lqexport.errors import UserError
from lqexport.evaluation.evaluate import WORST
from lqexport.models.source import open_source
from lqexport.storage.artifact import Artifact, decoded
from lqexport.verification import card, report
from lqexport.verification.result import TensorCheck, Verification
from lqexport.verification.roles import roles
from lqexport.verification.verifying import verify


def printed(result: Verification) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report.for_terminal(result))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_terminal_shows_numbers_and_sentences(found: Verification) -> None:
    result = dataclasses.replace(found, failed=["Too [bold]bad."], warnings=["Take care."], limits={"max_kl": 0.1})
    shown = printed(result)
    for part in ("Too [bold]bad.", "Take care.", "FAILED", f"{found.evaluations[0].kl:.5f}", "llama.cpp-512"):
        assert part in shown
    assert "result: passed" in printed(dataclasses.replace(found, limits={"max_kl": 9.0}))
    assert "no limit was set" in printed(dataclasses.replace(found, limits={}))


def test_json_has_everything_and_no_nan(found: Verification) -> None:
    broken = dataclasses.replace(found, evaluations=[not_finite(found.evaluations[0])])
    content = json.loads(json.dumps(broken.as_json()), parse_constant=pytest.fail)
    assert content["evaluations"][0]["kl"] is None
    assert content["evaluations"][0]["perplexity_ratio"] is None
    assert content["evaluations"][0]["kl_by_window"] == [None]
    assert {field.name for field in dataclasses.fields(Verification)} < set(content)
    assert (content["nbytes"], content["passed"]) == (found.nbytes, True)


def test_page_needs_no_network_and_has_all_plots(found: Verification, tmp_path: Path) -> None:
    report.save_html(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'<>]+""", page))
    # Names of XML vocabularies, which nothing fetches.
    assert addresses == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(script|link|img|iframe|object|embed|base)\b|@import|\bsrc=", page)
    assert all(target.startswith("#") for target in re.findall(r"""(?:href|url)[=(]["']?([^"')]*)""", page))
    assert page.count("<svg") == page.count("</svg>") == 6
    assert page.count("prefers-color-scheme: dark") == 1
    assert page.count("max-width: 36rem") == page.count('class="sizes"') == 1
    for part in (
        found.sha256,
        found.text_sha256,
        DOWN,
        "Output error by block",
        "Weights of model.layers.",
        "Predictions that changed most",
        "recipe.target",
        "gguf:Q4_0",
    ):
        assert part in page


def test_the_worst_tokens_are_those_of_the_largest_divergence(found: Verification, tiny_model: Path, text: str) -> None:
    (evaluation,) = found.evaluations
    divergences = [token.kl for token in evaluation.worst]
    assert divergences == sorted(divergences, reverse=True)
    assert len(divergences) == WORST
    assert divergences[0] == evaluation.kl_max
    tokenizer = open_source(str(tiny_model)).tokenizer()
    ids = tokenizer(Path(text).read_text())["input_ids"]
    for token, shown in zip(evaluation.worst, found.worst, strict=True):
        assert 257 <= token.position < 512
        position = 512 * token.window + token.position
        assert shown.came == tokenizer.decode(ids[position : position + 1])
        assert shown.before == tokenizer.decode(ids[position - 24 : position])
        assert shown.file_says == tokenizer.decode([token.top])


def test_the_portrait_of_a_matrix(found: Verification, lossy: Artifact, tiny_model: Path, text: str) -> None:
    assert found.portrait is not None
    errors = {tensor.name: tensor.weight_error or 0 for tensor in found.tensors if len(tensor.shape) == 2}
    assert found.portrait.name == max(errors, key=lambda name: errors[name])
    portrait = verify(lossy.folder, str(tiny_model), text=text, windows=1, linear=DOWN).portrait
    assert portrait is not None
    assert (portrait.name, portrait.codec, sum(portrait.source), sum(portrait.file)) == (
        DOWN,
        "gguf:Q4_0",
        256 * 512,
        256 * 512,
    )
    row = decoded(lossy.read(DOWN))[portrait.row]
    assert portrait.levels == sorted(set(row.tolist()))
    with pytest.raises(UserError, match="no matrix nothing"):
        verify(lossy.folder, str(tiny_model), text=text, windows=1, linear="nothing")


def test_the_card_has_the_figures(found: Verification, tmp_path: Path) -> None:
    card.save_card(dataclasses.replace(found, warnings=["A | bar."], against="org/model-1.5"), tmp_path / "README.md")
    content = (tmp_path / "README.md").read_text()
    assert content.startswith("---\nbase_model: org/model-1.5\nbase_model_relation: quantized\nlibrary_name: gguf\n")
    assert "\n# model-1.5, gguf:Q4_0\n" in content
    assert "\n| type | gguf:Q4_0 |\n" in content
    assert "`FROM ./model.gguf`" in content
    licensed = card.card(dataclasses.replace(found, license={"license": "other", "license_name": 'a "b": c'}))
    assert licensed.startswith('---\nlicense: "other"\nlicense_name: "a \\"b\\": c"\nlibrary_name')
    assert "base_model" not in card.card(found)  # the source is a local folder, which the hub would refuse
    for part in (
        found.sha256,
        f"{found.evaluations[0].kl:.5f}",
        "- A | bar.",
        "| target | gguf:Q4_0 |",
        "llama-cli -m",
    ):
        assert part in content
    rows = [line for line in content.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert "could not be run" in card.card(dataclasses.replace(found, evaluations=[]))


@pytest.fixture
def browser(load_script: Callable[[str], ModuleType]) -> Iterator[Any]:
    """A headless Chromium. Skips the test if there is none."""
    errors = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is missing")
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(load_script("tools/screenshots.py").chromium())
        except errors.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield opened


def test_a_browser_shows_the_page(found: Verification, tmp_path: Path, browser: Any) -> None:
    """The page shows every part in a wide and a narrow window, without errors and without requests besides the page."""
    hostile = dataclasses.replace(found, warnings=["<script>console.error('run')</script>"])
    report.save_html(hostile, tmp_path / "page.html")
    address = (tmp_path / "page.html").as_uri()
    page, requests, errors = browser.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    assert page.title().endswith(Path(found.file).name)
    assert page.locator("h2:visible").count() == 6
    assert page.locator(".plot svg:visible").count() == 6
    for part in ("Predictions that changed most", "KL divergence along the text", found.sha256):
        assert page.get_by_text(part).first.is_visible()
    tensor = page.locator("details").get_by_text(DOWN, exact=True)
    assert not tensor.is_visible()
    page.locator("summary").click()
    assert tensor.is_visible()
    for width in (1200, 380):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert requests == [address]
    assert errors == []


def test_page_escapes_what_it_shows(found: Verification) -> None:
    evil = "<script>alert('x')</script>"
    result = dataclasses.replace(
        found,
        file=evil,
        against=evil,
        text=evil,
        failed=[evil],
        warnings=[evil],
        run={evil: evil},
        tensors=[dataclasses.replace(found.tensors[-2], name=f"model.layers.0.{evil}.weight")],
        evaluations=[dataclasses.replace(found.evaluations[0], protocol=evil)],
    )
    page = report.as_html(result)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_page_of_a_failed_structure_has_no_numbers(found: Verification) -> None:
    nothing: dict[str, Any] = {"evaluations": [], "tensors": [], "worst": [], "portrait": None}
    page = report.as_html(dataclasses.replace(found, **nothing, failed=["Tensors are missing."]))
    assert "Tensors are missing." in page
    assert "<svg" not in page


def test_page_with_numbers_that_are_not_finite(found: Verification) -> None:
    page = report.as_html(dataclasses.replace(found, evaluations=[not_finite(found.evaluations[0])]))
    assert "not finite" in page
    assert "KL divergence along the text" not in page


def test_equal_results_give_equal_pages(found: Verification) -> None:
    assert report.as_html(found) == report.as_html(found)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_packages_name_the_extra(
    found: Verification, module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else installed(name))
    with pytest.raises(UserError, match=r"pip install '\.\[report\]'"):
        report.save_html(found, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_roles_sum_up_all_tensors(found: Verification) -> None:
    grouped = roles(found.tensors)
    assert sum(role.nbytes for role in grouped) == found.nbytes
    assert sum(role.count for role in grouped) == len(found.tensors)
    by_name = {role.name: role for role in grouped}
    assert (by_name["mlp.down_proj"].count, by_name["mlp.down_proj"].types) == (2, ("gguf:Q4_0",))
    assert by_name["norms and biases"].count == 5


def test_a_file_with_norms_of_gemma_is_a_gguf_file() -> None:
    """Codecs such as gguf-norm:F32 are no family of their own: the card says how a GGUF file is run."""
    result = Verification("model.gguf", "", "", "", "lqexport", "cpu", "", "", {})
    for codec in ("gguf:Q4_K", "gguf-norm:F32", "gguf-scaled:NVFP4"):
        result.tensors.append(TensorCheck("name", codec, (2, 2), 8, None, None, True, None))
    assert result.family == "gguf"
