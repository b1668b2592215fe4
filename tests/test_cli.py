"""The command line: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from lqexport.cli import app as cli_app
from lqexport.cli.app import app
from lqexport.cli.options import merged_recipe
from lqexport.converters.folders import peft
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.models import inspect as inspection
from lqexport.planning import cost, dryrun, rates
from lqexport.planning.memory import memory_estimate
from lqexport.recipe import Recipe
from lqexport.runtime.placement import all_on_device

COMMANDS = ("export", "quantize", "plan", "to-gguf", "to-peft", "to-exl2", "to-exl3", "to-gptq",
            "to-compressed-tensors", "to-native", "check", "verify",
            "compare", "eval", "judge", "push-to-hub", "inspect")  # fmt: skip


def run(*arguments: object, status: int = 0) -> Any:
    """Run a command in this process and check its exit status."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def odd_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of zeros whose hidden size, 96, no block of 256 divides, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("odd")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    config |= {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    names = [name for name in gguf_names(LLAMA, 2) if name.endswith(".weight") and name != "lm_head.weight"]
    save_file({name: torch.zeros(odd_shape(name), dtype=torch.float16) for name in names}, folder / "model.safetensors")
    return folder


def odd_shape(name: str) -> tuple[int, ...]:
    if "norm" in name:
        return (96,)
    rows = {"embed_tokens": 64, "gate_proj": 256, "up_proj": 256}
    return (rows.get(name.split(".")[-2], 96), 256 if "down_proj" in name else 96)


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, rounded to Q4_0."""
    out = tmp_path_factory.mktemp("run") / "out"
    small = ("--samples", 2, "--sequence-length", 32, "--tune", 2)
    run("quantize", tiny_model, out, "--target", "gguf:Q4_0", "--method", "rtn", *small, "--device", "cpu")
    return out


@pytest.fixture(scope="module")
def gguf_file(artifact: Path) -> Path:
    file = artifact.with_name("tiny.gguf")
    run("to-gguf", artifact, file)
    return file


# --- help and options ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str) -> None:
    output = run(command, "--help").output
    assert "Examples:" in output
    examples = get_command(app).commands[command].help.count(f"lqexport {command} ")  # type: ignore[attr-defined]
    begun = [line for line in output.splitlines() if line.strip().startswith(f"lqexport {command} ")]
    assert 0 < examples == len(begun), "typer joins the lines of examples that follow the first paragraph"


def test_version() -> None:
    assert run("--version").output == "lqexport 0.2.0\n"


def test_every_recipe_option_is_a_command_line_option() -> None:
    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    parameters = {parameter.name: parameter for parameter in command.params}
    for field in dataclasses.fields(Recipe):
        assert field.name in parameters
        assert parameters[field.name].default is None  # else it would override the recipe file


def test_help_shows_the_common_path_first() -> None:
    """Options without a panel come first; every other one is in a panel with a name."""
    parameters = get_command(app).commands["quantize"].params  # type: ignore[attr-defined]  # it is a group
    panels = {option.name: option.rich_help_panel for option in parameters if option.param_type_name == "option"}
    common = [name for name, panel in panels.items() if panel is None]
    assert common == list(panels)[: len(common)]
    assert {"target", "size", "bits", "calibration", "device", "dry_run"} <= set(common)
    assert len(common) < 15
    output = run("quantize", "--help-all").output
    assert "A stopped run goes on" in output
    assert output.index("--target") < output.index("--dampening")


def test_options_are_declared_once() -> None:
    """Help, panel and default of an option come from the recipe's field."""
    parameters = {option.name: option for option in get_command(app).commands["quantize"].params}  # type: ignore[attr-defined]
    for option in dataclasses.fields(Recipe):
        if option.name != "source":
            shown = parameters[option.name]
            assert shown.help.startswith(option.metadata["help"])
            assert shown.rich_help_panel == option.metadata["panel"]
            assert shown.default is None


def test_command_line_overrides_the_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('target = "gguf:Q4_K"\nsamples = 3\nact_order = true\nfallback = false\n')
    recipe = merged_recipe(file, {"source": "model", "samples": 5, "act_order": False, "seed": None, "fallback": None})
    expected = Recipe("model", "gguf:Q4_K", samples=5, act_order=False, fallback=False)
    assert recipe == expected


def test_no_target_is_said(odd_model: Path, tmp_path: Path) -> None:
    assert "--target" in run("quantize", odd_model, tmp_path / "out", status=2).stderr


@pytest.mark.parametrize(
    ("command", "option", "name", "sentence"),
    [
        ("verify", "--html", "folder", "folder is a folder"),
        ("verify", "--card", "file/card.md", "file cannot be written"),
        ("verify", "--record", "file", "file is a file"),
        ("compare", "--plot", "file/new/plot.svg", "file cannot be written"),
        ("compare", "--plot", "plot.png", "ends in .svg"),
    ],
)
def test_where_reports_cannot_be_written_is_said_before_work(
    command: str, option: str, name: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    shown = run(command, tmp_path / "file", "--against", tmp_path, option, tmp_path / name, status=2)
    assert sentence in shown.stderr


# --- dry run ---


def test_dry_run_prints_the_plan_and_writes_nothing(odd_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    output = run("quantize", odd_model, out, "--target", "gguf:Q4_K", "--dry-run").output
    assert "12 tensors take gguf:Q5_0 instead of gguf:Q4_K: 96 columns are not a multiple of 256" in output
    assert "Peak memory: about" in output
    assert "Time on" in output
    assert "By effort: fast" in output
    assert not out.parent.exists()


def test_dry_run_as_json_adds_up(odd_model: Path, tmp_path: Path) -> None:
    arguments = ("quantize", odd_model, tmp_path / "out", "--target", "gguf:Q4_K", "--dry-run", "--json")
    told = json.loads(run(*arguments).output)
    assert told["tensor_bytes"] == sum(tensor["nbytes"] for tensor in told["tensors"])
    weights = 64 * 96 + 2 * (4 * 96 * 96 + 3 * 96 * 256 + 2 * 96) + 96
    assert told["bits_per_weight"] == pytest.approx(8 * told["tensor_bytes"] / weights)
    assert {tensor["codec"] for tensor in told["tensors"]} == {"gguf:Q5_0", "gguf:Q4_K", "gguf:Q8_0", "gguf:F32"}
    seconds = told["estimated_seconds_by_effort"]
    assert seconds["fast"] < seconds["default"] < seconds["best"]
    assert seconds["default"] == told["estimated_seconds"]


def dry_run(source: Path, out: Path, *options: object, status: int) -> str:
    """Runs `quantize --dry-run`, and returns what it says on standard error."""
    return str(run("quantize", source, out, "--target", "gguf:Q4_0", "--dry-run", *options, status=status).stderr)


def test_dry_run_refuses_what_the_run_would(odd_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "There is no text file none.txt" in dry_run(odd_model, out, "--calibration", "none.txt", status=2)
    assert "has no split 'best'" in dry_run(odd_model, out, "--calibration", "c4:best", status=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "other exists and is not an lqexport artifact" in dry_run(odd_model, tmp_path / "other", status=2)
    assert not out.exists()


def test_dry_run_without_a_tokenizer_refuses_what_must_be_calibrated(odd_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(odd_model / name, source)
    assert "The tokenizer in" in dry_run(source, tmp_path / "out", status=2)
    dry_run(source, tmp_path / "out", "--method", "rtn", "--calibration", "none.txt", status=0)  # needs neither


def test_dry_run_refuses_to_write_over_the_source(odd_model: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").symlink_to(odd_model)
    assert "is the source" in dry_run(odd_model, tmp_path / "odd", status=2)


def test_the_output_may_lie_within_the_source(odd_model: Path) -> None:
    """`quantize . ./out` is what people type in a model's folder."""
    assert (
        "Tensor data"
        in run("quantize", odd_model, odd_model / "out", "--target", "gguf:Q4_0", "--method", "rtn", "--dry-run").output
    )
    assert not (odd_model / "out").exists()


def test_no_fallback_refuses(odd_model: Path, tmp_path: Path) -> None:
    result = run("quantize", odd_model, tmp_path / "out", "--target", "gguf:Q4_K", "--no-fallback", status=2)
    assert "cannot hold 12 of" in result.stderr
    assert not (tmp_path / "out").exists()


def test_full_disk_is_said_before_any_work(odd_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    for dry in ((), ("--dry-run",)):
        result = run("quantize", odd_model, tmp_path / "out", "--target", "gguf:Q4_K", *dry, status=2)
        assert "the disk has 1.0 kB free" in result.stderr
    assert not (tmp_path / "out").exists()


def test_estimates_grow_with_the_work(odd_model: Path, tmp_path: Path) -> None:
    def estimates(**options: Any) -> tuple[int, float]:
        shown = dryrun.preview(Recipe(str(odd_model), "gguf:Q4_K", prefix="full", **options), tmp_path)
        rates = cost.Rates(1e10, 1e10, 1e10)
        return memory_estimate(shown.work, all_on_device(torch.device("cpu"))), cost.seconds_estimate(
            shown.work, rates, 1
        )

    small, more, rounded = estimates(samples=8), estimates(samples=80), estimates(samples=8, method="rtn")
    assert 0 < more[0] - small[0] < small[0] / 50  # hidden states are kept
    assert more[1] > small[1] > rounded[1] > 0


def test_flops_of_one_linear_by_hand(odd_model: Path, tmp_path: Path) -> None:
    shown = dryrun.preview(Recipe(str(odd_model), "gguf:Q4_K", samples=1, sequence_length=8, descent=0, tune=0,
                                   moments="normalized", prefix="full"), tmp_path)  # fmt: skip
    linears = 2 * (4 * 96 * 96 + 3 * 96 * 256)
    forward = 8 * (2 * linears + 4 * 8 * 96 * 2)
    # One more pass before, for the sizes of inputs, by which it is smoothed.
    inputs = 2 * [96, 96, 96, 256]  # of query, key and value; of output; of gate and up; of down
    moments = sum(8 * width**2 for width in inputs)
    factors = sum(width**3 for width in inputs) * (1 / 3 + 1 / 3)  # Cholesky, and the inverse of the triangle
    solving = 2 * (4 * 96**3 + 2 * 256 * 96**2 + 96 * 256**2)
    found = cost.operations_estimate(shown.work)
    assert found == cost.Operations(2 * forward, moments, pytest.approx(factors), 0.0, solving)
    # In two models; where no pass can be held, up to the inputs of output, of gate and up, and of down, and whole.
    query, gate = 3 * 96 * 96, 2 * 96 * 256
    runs = 2 * (1 + (query + (query + 96 * 96) + (query + 96 * 96 + gate)) / (linears / 2))
    both = dataclasses.replace(shown.recipe, prefix="quantized", asymmetric=True)
    twice = cost.operations_estimate(dataclasses.replace(shown.work, recipe=both))
    assert twice.passes == pytest.approx((1 + 2) * forward)
    again = cost.operations_estimate(dataclasses.replace(shown.work, recipe=both), held=0)
    assert again.passes == pytest.approx((1 + runs) * forward)
    sums = 3 * moments + 2 * 8 * 2 * (96 * 96 + 96 * 256)  # and what the hidden states lack
    assert twice.moments == pytest.approx(sums)
    assert twice.factors == pytest.approx(factors)  # one factor serves the target and the solver
    # Rows of a linear times a square matrix: what it lacks, and two triangles. Of at most 128 rows, for either half:
    # what they lack, two triangles, and the error on the other half.
    products = 2 * (4 * 96**3 + 2 * 256 * 96**2 + 96 * 256**2)
    sampled = 2 * (4 * 96**3 + 2 * 128 * 96**2 + 96 * 256**2)
    assert twice.targets == pytest.approx((2 + 2) * products + 2 * (2 + 2 + 2) * sampled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_rate_is_one_of_this_century(dtype: torch.dtype) -> None:
    assert 1e8 < rates.measured_rate("cpu", dtype, size=256, seconds=0.05) < 1e16


# --- inspect ---


def test_inspect_a_folder_reads_true_sizes(tiny_model: Path) -> None:
    found = inspection.inspect(tiny_model)
    header = int.from_bytes((tiny_model / "model.safetensors").read_bytes()[:8], "little")
    assert inspection.size(found.entries) == (tiny_model / "model.safetensors").stat().st_size - 8 - header
    assert inspection.bits(found.entries) == 16


def test_inspect_folder_artifact_and_file(tiny_model: Path, artifact: Path, gguf_file: Path) -> None:
    folder, run_folder, file = (
        json.loads(run("inspect", path, "--json").output) for path in (tiny_model, artifact, gguf_file)
    )
    assert folder["weights"] == run_folder["weights"] == file["weights"]
    assert run_folder["nbytes"] == file["nbytes"] < gguf_file.stat().st_size
    assert [kind["type"] for kind in file["kinds"]] == [kind["type"] for kind in run_folder["kinds"]]
    q_proj = next(kind for kind in file["kinds"] if "q_proj" in kind["kind"])
    assert (q_proj["type"], q_proj["count"], q_proj["bits_per_weight"]) == ("gguf:Q4_0", 2, 4.5)


def test_inspect_lists_kinds_or_every_tensor(tiny_model: Path) -> None:
    assert "layers.*.mlp.up_proj.weight" in run("inspect", tiny_model).output
    assert "model.layers.1.mlp.up_proj.weight" in run("inspect", tiny_model, "-v").output


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (2e13, "20.0 TB")]
)
def test_human_bytes(count: float, text: str) -> None:
    assert inspection.human_bytes(count) == text


# --- how commands end ---


def test_whole_run(tiny_model: Path, artifact: Path, gguf_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    common = ("verify", gguf_file, "--against", tiny_model, "--windows", 1, "--artifact", artifact, "--device", "cpu")
    told = json.loads(run(*common, "--max-kl", 100, "--html", page, "--json").stdout)
    assert told["passed"]
    assert all(tensor["same_bytes"] for tensor in told["tensors"])
    assert "<svg" in page.read_text()
    assert "mean KL divergence" in run(*common, "--max-kl", 1e-12, status=1).stdout


@pytest.mark.parametrize("target", ["gguf:Q4_0", "native:table-3", "gptq:4-g64"])
def test_every_next_step_that_is_printed_runs(
    target: str, tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_step(shown: str) -> list[str]:
        (line,) = [line for line in shown.splitlines() if "Next: " in line]
        return shlex.split(line.partition("Next: lqexport ")[2])

    monkeypatch.chdir(tmp_path)
    small = ("--method", "rtn", "--samples", 2, "--sequence-length", 32, "--rank", 2, "--device", "cpu")
    quantized = run("quantize", tiny_model, "my out", "--target", target, *small)
    exported = run(*next_step(quantized.stdout))
    if target.startswith("gptq"):
        run("to-peft", "my out", "ADAPTER")
    verify = next_step(exported.stdout)
    assert "result: passed" in run(*verify, "--text", text, "--windows", 1).stdout


def test_a_blown_up_file_fails_without_any_option(tiny_model: Path, tmp_path: Path) -> None:
    """Its last norm is 40 times too large, so the model is sure of the wrong tokens."""
    shutil.copytree(tiny_model, tmp_path / "broken")
    state = load_file(tmp_path / "broken" / "model.safetensors")
    state["model.norm.weight"] *= 40
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    run("quantize", tmp_path / "broken", tmp_path / "out", "--target", "gguf:F16", "--device", "cpu")
    verify = ("verify", tmp_path / "out", "--against", tiny_model, "--windows", 1, "--device", "cpu")
    assert "above the limit of 2" in run(*verify, status=1).stdout
    unlimited = ("--max-perplexity-ratio", 0, "--max-over-expected", 0)
    assert "no limit was set" in run(*verify, *unlimited).stdout


def test_page_that_cannot_be_made_is_said_before_any_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("verify", tiny_model, "--against", tiny_model, "--html", tmp_path / "page.html", status=2)
    assert "'.[report]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("inspect", "nowhere"), "There is no file or folder nowhere."),
        (("to-gguf", "nowhere", "x.gguf"), "There is no file or folder nowhere."),
        (
            ("quantize", "./nowhere", "out", "--target", "gguf:Q4_0"),
            "There is no folder ./nowhere, and it is not a hub id",
        ),
        (("export", "./nowhere", "x-Q4_0.gguf"), "There is no folder ./nowhere, and it is not a hub id"),
        (("plan", "nowhere", "--target", "gguf:Q4_0"), "There is no file or folder nowhere."),
        (("verify", "nowhere.gguf", "--against", "."), "nowhere.gguf"),
        (("quantize", "nowhere.gguf", "out", "--target", "gguf:Q4_0"), "There is no file nowhere.gguf."),
        (("quantize", ".", "out", "--target", "gguf:Q4_0", "--device", "tpu"), "choose auto, cpu or cuda"),
        (("quantize", ".", "out", "--target", "gguf:Q4_0", "--device", "cuda:99"), "no CUDA device cuda:99"),
        (("quantize", ".", "out", "--target", "gguf:Q4_0", "--method", "awq"), "method cannot be 'awq'"),
        (("quantize", ".", "out", "--recipe", "none.toml"), "Cannot read the recipe none.toml"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, status=2)
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "adapter_config.json",
            '{"base_model_name_or_path": "org/base"}',
            "an adapter of org/base, and no",
        ),
        ("model_index.json", "{}", "a diffusion model"),
    ],
)
def test_what_people_take_for_a_model_is_said(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    for command in (("quantize", tmp_path, "out", "--target", "Q4_0"), ("export", tmp_path, "m-Q4_0.gguf")):
        said = run(*command, status=2).stderr
        assert sentence in said
        assert said.count("\n") == 1


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a bug\nof two lines")


def test_unexpected_error_is_not_hidden(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one line with a status of its own, and its traceback is in the log file that the line names."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("LQEXPORT_TRACEBACK", raising=False)
    monkeypatch.setattr(inspection, "inspect", broken)
    result = run("inspect", tiny_model, status=3)
    (log,) = tmp_path.iterdir()
    expected = "error: The command ended with an unexpected ZeroDivisionError (a bug of two lines)"
    assert result.stderr == f"{expected}; its traceback is in {log}.\n"
    logged = log.read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in logged
    assert "in broken" in logged
    assert f"lqexport {importlib.metadata.version('lqexport')}" in logged


def test_a_damaged_artifact_is_no_unexpected_error_of_to_peft(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(peft, "write", damaged)
    assert "is damaged" in run("to-peft", artifact, tmp_path / "adapter", status=2).stderr


def test_traceback_is_printed_where_it_is_asked_for(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "inspect", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LQEXPORT_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in run("inspect", tiny_model, status=3).stderr
    monkeypatch.setenv("LQEXPORT_TRACEBACK", "0")
    assert "Traceback" not in run("inspect", tiny_model, status=3).stderr
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))  # no log file, so it must be printed
    assert "Traceback (most recent call last)" in run("inspect", tiny_model, status=3).stderr


def test_unexpected_error_outside_of_a_command_has_the_same_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cli_app, "app", broken)
    with pytest.raises(SystemExit) as ended:
        cli_app.main()
    assert ended.value.code == 3
    assert "ZeroDivisionError (a bug of two lines)" in capsys.readouterr().err


def test_all_exit_statuses_are_documented(root: Path) -> None:
    told = " ".join(run("--help").output.replace("│", " ").split())
    for page in (told, (root / "README.md").read_text(encoding="utf-8")):
        assert "3 an error that nobody expected" in page


def test_a_reader_that_has_gone_is_no_exceeded_limit(tiny_model: Path) -> None:
    process = start("inspect", tiny_model, "--verbose")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "lqexport", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_ctrl_c_says_how_to_resume(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("quantize", tiny_model, out, "--target", "gguf:Q4_K", "--samples", 400, "--sequence-length", 256)
    deadline = time.monotonic() + 60
    while not (out / "run.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stdout + stderr
    assert "Run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not (out / "manifest.json").exists()


COMMANDS_WITHOUT_TORCH = """
import sys
from lqexport.cli.app import app
for line in sys.stdin:
    try:
        app(line.split())
    except SystemExit as ending:
        assert ending.code == int(sys.argv[1]), line
assert not {"torch", "transformers", "numba"} & set(sys.modules)
"""


def run_without_torch(commands: list[str], status: int) -> subprocess.CompletedProcess[str]:
    """Run commands in one process, and check the exit status of each and that nothing large was imported."""
    process = subprocess.run(
        [sys.executable, "-c", COMMANDS_WITHOUT_TORCH, str(status)],
        input="\n".join(commands), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process


def test_missing_inputs_are_said_before_anything_large_is_imported() -> None:
    commands = [
        "quantize ./nowhere out --target gguf:Q4_0", "export ./nowhere x-Q4_0.gguf", "inspect nowhere",
        "check nowhere.gguf", "verify nowhere.gguf --against ./nowhere", "verify . --against ./nowhere",
        "compare nowhere.gguf --against .", "to-gguf nowhere x.gguf", "to-gptq nowhere x", "to-peft nowhere x",
        "eval nowhere --text ptb", "judge nowhere --endpoint http://localhost --model x",
        "judge . --endpoint http://localhost --model x --against ./nowhere", "check . --against ./nowhere",
        "plan nowhere --target gguf:Q4_0",
    ]  # fmt: skip
    assert run_without_torch(commands, 2).stderr.count("error: There is no ") == len(commands)


def test_wrong_names_of_files_are_said_before_anything_large_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("taken-Q4_0.gguf").touch()
    commands = [
        "export ./model x.gguf", "export ./model x --target q4_0", "export ./model x.gguf --target exl3:3",
        "export ./model taken-Q4_0.gguf",
    ]  # fmt: skip
    assert run_without_torch(commands, 2).stderr.count("error: ") == len(commands)


def test_what_only_reads_headers_imports_nothing_large(artifact: Path, gguf_file: Path) -> None:
    """Importing torch and transformers takes seconds."""
    commands = ["--help", "quantize --help-all", f"inspect {gguf_file}", f"inspect {artifact} --json"]
    printed = run_without_torch([*commands, f"check {gguf_file}"], 0).stdout
    assert "GGUF file" in printed
    assert "lqexport artifact" in printed
    assert "sound" in printed


def test_exit_status_of_the_installed_command() -> None:
    process = start("inspect", "nowhere")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr == "error: There is no file or folder nowhere.\n"
