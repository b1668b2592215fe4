"""Importance matrices: written and read as llama.cpp does, and models that are quantized under one."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lqexport
from lqexport.calibration.sequences import load_calibration
from lqexport.cli.app import app
from lqexport.converters.gguf.imatrix import read_imatrix, write_imatrix
from lqexport.errors import UserError
from lqexport.models.source import open_source
from lqexport.models.written import open_export
from lqexport.recipe import Recipe, SolverSettings
from lqexport.runtime.placement import all_on_device
from lqexport.solver.linear import solve_linear
from lqexport.solver.weighted_linear import solve_weighted

NAME = "blk.0.ffn_up.weight"
SETTINGS = SolverSettings("lean", "blocked", None, "diagonal", 1.0, True, 2)


def test_a_written_matrix_is_as_llama_imatrix_writes_it(tmp_path: Path) -> None:
    squares = {"blk.1.attn_q.weight": np.array([[4, 8, 2]], np.float32), NAME: np.array([[0, 5], [2, 6]], np.float32)}
    write_imatrix(tmp_path / "i.gguf", squares, dataset="a text", chunks=2, chunk_size=2)
    matrix = read_imatrix(tmp_path / "i.gguf")
    assert {name: mean.tolist() for name, mean in matrix.means.items()} == {
        "blk.1.attn_q.weight": [[2, 0.5]], NAME: [[1], [3]],  # an expert that no token reached gets ones
    }  # fmt: skip
    assert matrix.datasets == ("a text",)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix", "imatrix.datasets": ["a text"], "imatrix.chunk_count": 2, "imatrix.chunk_size": 2,
    }  # fmt: skip
    assert [(tensor.name, tensor.data.shape) for tensor in reader.tensors] == [
        (f"{NAME}.in_sum2", (2, 1)), (f"{NAME}.counts", (2, 1)),
        ("blk.1.attn_q.weight.in_sum2", (1, 2)), ("blk.1.attn_q.weight.counts", (1, 1)),
    ]  # fmt: skip


def old_format(entries: dict[str, tuple[int, list[float]]], dataset: str | None = "a text") -> bytes:
    """The bytes of the older format: name -> calls and values."""
    content = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        content += struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name.encode(), calls, len(values), *values)
    return (
        content if dataset is None else content + struct.pack(f"<ii{len(dataset)}s", 7, len(dataset), dataset.encode())
    )


@pytest.mark.parametrize("dataset", ["a text", None])
def test_the_older_format_is_read(dataset: str | None, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(old_format({NAME: (4, [2.0, 8.0, 4.0, 0.0])}, dataset))
    matrix = read_imatrix(tmp_path / "i.dat")
    assert matrix.means[NAME].tolist() == [[0.5, 2.0, 1.0, 0.0]]
    assert matrix.datasets == ((dataset,) if dataset else ())
    assert matrix.mean(NAME, 1, 2).tolist() == [1.0, 0.0]
    assert matrix.mean("blk.9.ffn_up.weight", None, 4) is None
    with pytest.raises(ValueError, match="whose inputs are 3"):
        matrix.mean(NAME, None, 3)


def test_files_that_are_no_matrix_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "i"
    whole = old_format({NAME: (4, [2.0, 8.0])})
    for content in (b"", b"no matrix at all, but long enough", whole[:30], old_format({NAME: (1, [float("nan")])}),
                    old_format({NAME: (1, [-1.0])}), old_format({})):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"i (is|has)"):
            read_imatrix(path)
    with pytest.raises(UserError, match="Cannot read"):
        read_imatrix(tmp_path / "absent")
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="no importance matrix"):
        read_imatrix(path)


def test_a_weighted_linear_is_one_solved_under_the_diagonal() -> None:
    """Columns do not depend on each other, so runs of columns give what the whole matrix gives."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 1024, generator=generator)
    means = torch.rand(1024, generator=generator).square()
    placement = all_on_device(weight.device)
    for codec in ("gguf:Q4_K", "gguf:Q5_0", "gguf:F16"):
        runs = solve_weighted("w", weight, means, codec, SETTINGS, placement)
        whole = solve_linear("w", weight, torch.diag(means), codec, replace(SETTINGS, dampening=0.0))
        assert runs.shape == whole.shape
        assert {name: plane.tolist() for name, plane in runs.planes.items()} == {
            name: plane.tolist() for name, plane in whole.planes.items()
        }
        if codec != "gguf:F16":
            assert runs.facts["loss"] == pytest.approx(whole.facts["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def calibration(text: Path) -> dict[str, Any]:
    return {"calibration": str(text), "samples": 3, "sequence_length": 32}


@pytest.fixture(scope="module")
def matrix(smaller_model: Path, calibration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    lqexport.make_imatrix(str(smaller_model), path, device="cpu", **calibration)
    return path


def test_a_matrix_has_the_squares_of_what_enters_a_linear(
    matrix: Path, smaller_model: Path, calibration: dict[str, Any]
) -> None:
    """transformers runs the model, and hooks see what enters its linears."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smaller_model, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    options = dict(calibration)
    tokens = load_calibration(
        options.pop("calibration"), AutoTokenizer.from_pretrained(smaller_model), seed=0, **options
    ).tokens  # fmt: skip
    with torch.no_grad():
        model(tokens)
    means = read_imatrix(matrix).means
    assert len(seen) == 2 * model.config.num_hidden_layers
    for name, inputs in seen.items():
        layer, ending = name.split(".")[2], {"q_proj": "attn_q", "down_proj": "ffn_down"}[name.rpartition(".")[2]]
        expected = inputs.double().square().mean((0, 1))
        np.testing.assert_allclose(means[f"blk.{layer}.{ending}.weight"][0], expected, rtol=1e-4)


def test_a_model_is_quantized_under_a_matrix_without_passes(matrix: Path, smaller_model: Path, tmp_path: Path) -> None:
    """Weighted by the matrix, the outputs' error is below that of rounding, and no text is read."""
    losses = {}
    for label, options in (("rtn", {"method": "rtn"}), ("imatrix", {"imatrix": str(matrix)})):
        recipe = Recipe(str(smaller_model), "gguf:Q4_0", calibration="/no/text.txt", **options)  # type: ignore[arg-type]
        report = lqexport.quantize(recipe, tmp_path / label, device="cpu")
        written, source = open_export(tmp_path / label), open_source(str(smaller_model))
        name = "model.layers.0.mlp.up_proj.weight"
        error = torch.as_tensor(np.asarray(written.read(name))).double() - source.read(name).double()
        losses[label] = float(error.square().sum(0) @ torch.from_numpy(read_imatrix(matrix).means[NAME][0]).double())
    assert losses["imatrix"] < 0.9 * losses["rtn"]
    run = json.loads((tmp_path / "imatrix" / "run.json").read_text())
    assert run["imatrix"]["datasets"] == ["calibration.txt"]
    assert report["run"]["calibration"] is None


def test_experts_have_each_their_own(experts_model: Path, calibration: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    lqexport.make_imatrix(str(experts_model), path, device="cpu", **calibration)
    means = read_imatrix(path).means["blk.1.ffn_up_exps.weight"]
    assert len(means) > 1
    assert not np.array_equal(means[0], means[1])
    recipe = Recipe(str(experts_model), "gguf:Q4_0", imatrix=str(path))
    lqexport.quantize(recipe, tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_what_does_not_go_with_a_matrix_is_said_before_work(
    matrix: Path, smaller_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for options, words in (
        ({"target": "native:table-3"}, "needs a target gguf:TYPE"), ({"method": "rtn"}, "for the method lean"),
        ({"asymmetric": True}, "asymmetric needs calibration"), ({"tune": 3}, "tune needs calibration"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            Recipe(str(smaller_model), **{"target": "gguf:Q4_0", "imatrix": str(matrix)} | options)
    with pytest.raises(UserError, match="is of another model"):
        lqexport.preview(Recipe(str(tiny_model), "gguf:Q4_0", imatrix=str(matrix)), tmp_path / "out")
    means = read_imatrix(matrix).means
    squares = {name: np.hstack([np.ones((len(mean), 1)), mean]).astype(np.float32) for name, mean in means.items()}
    del squares[NAME]
    write_imatrix(tmp_path / "part.gguf", squares, dataset="", chunks=1, chunk_size=1)
    shown = lqexport.preview(
        Recipe(str(smaller_model), "gguf:Q4_0", imatrix=str(tmp_path / "part.gguf")), tmp_path / "out"
    )
    assert "lacks model.layers.0.mlp.up_proj.weight" in shown.warnings[0]
    result = CliRunner().invoke(app, ["imatrix", str(smaller_model), str(matrix)])
    assert (result.exit_code, "exists" in result.stderr) == (2, True)
