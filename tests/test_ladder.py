"""`lqexport ladder`: all files of a model that a publisher offers, from one command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

import lqexport
from lqexport.cli.app import app
from lqexport.cli.ladder import ladder
from lqexport.converters.gguf.mixes import MEASURED
from lqexport.delivery.ladder import TYPES as DEFAULT_TYPES
from lqexport.delivery.ladder import Ladder, planned_ladder
from lqexport.delivery.ladder_plan import planned_files
from lqexport.delivery.request import Measurement
from lqexport.pipeline import second_moments, types_by_size
from lqexport.planning import compute_dtype
from lqexport.planning.memory import MemoryLimits
from lqexport.storage.files import claimed, file_digest
from lqexport.verification import report
from lqexport.verification.publish import upload_list

TYPES = ["Q4_0", "Q8_0"]


@pytest.fixture(scope="module", autouse=True)
def no_plots_in_reports() -> Any:
    """Draws no plots into the files' own reports, which take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "plots", lambda result: [])
        yield


@pytest.fixture(scope="module", autouse=True)
def chosen_dtype() -> Any:
    """Makes a machine whose runs choose bfloat16, which their recipes leave open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_dtype, "bfloat16_ratio", lambda: 4.0)
        patch.setattr(compute_dtype, "LEAST_OPERATIONS", 0.0)
        yield


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few windows of the small model."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40)
    return path


@pytest.fixture(scope="module")
def arguments(text: Path, smaller_model: Path, short_text: Path) -> dict[str, Any]:
    """Arguments of `make_ladder` for a short ladder in which files share second moments."""
    recipe = lqexport.Recipe(
        str(smaller_model), "gguf:Q4_0", calibration=str(text), samples=2, sequence_length=32, effort="fast"
    )
    return {"model": recipe, "text": str(short_text), "windows": 1, "engine": "lqexport", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ladder that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "files"
    assert lqexport.make_ladder(folder=path, types=TYPES, **arguments).passed
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def lines_of(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("| `")]


def test_a_ladder_is_files_with_records_a_card_and_a_plot(folder: Path, smaller_model: Path) -> None:
    files = [f"{smaller_model.name}-{name}.gguf" for name in TYPES]
    assert names(folder) == {*files, *(f"{file}.record" for file in files), "README.md", "ladder.svg", "ladder.json"}
    card = (folder / "README.md").read_text()
    listed = json.loads((folder / "ladder.json").read_text())["files"]
    assert [entry["file"] for entry in listed] == files
    for entry, line in zip(listed, lines_of(card), strict=True):
        record = json.loads((folder / f"{entry['file']}.record" / "verification.json").read_text())
        assert entry["kl"] == record["evaluations"][0]["kl"]
        assert f"{entry['kl']:.5f}" in line
        assert f"{record['bits_per_weight']:.3f}" in line
    assert card.startswith("---\n")
    assert "ladder.svg" in card
    assert str(smaller_model.parent) not in card
    assert "<svg" in (folder / "ladder.svg").read_text()


def test_a_file_of_a_ladder_is_the_file_of_an_export(folder: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    """Sharing second moments changes no byte."""
    lqexport.export_model(path=tmp_path / "alone-Q4_0.gguf", **arguments)
    assert file_digest(tmp_path / "alone-Q4_0.gguf") == file_digest(next(folder.glob("*-Q4_0.gguf")))


def test_files_share_their_second_moments(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    collect = second_moments.forward_moments
    monkeypatch.setattr(
        second_moments, "forward_moments", lambda *given, **named: collected.append(1) or collect(*given, **named)
    )
    lqexport.make_ladder(folder=tmp_path, types=["Q3_K", "F16", "Q2_K"], **arguments)  # none of them is smoothed
    assert collected == [1]
    assert not (tmp_path / ".ladder").exists()


def test_sizes_share_what_their_types_lose(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    losses = types_by_size.type_losses
    monkeypatch.setattr(types_by_size, "type_losses", lambda name, *rest: measured.append(name) or losses(name, *rest))
    sizes = ["7bpw", "7.5bpw"]
    made = lqexport.make_ladder(folder=tmp_path / "files", types=["Q4_0"], sizes=sizes, **arguments)
    assert len(measured) == len(set(measured)) > 0
    assert [step.target for step in made.steps] == ["gguf:Q4_0", "gguf:auto", "gguf:auto"]
    assert not (tmp_path / "files" / ".ladder").exists()
    recipe = dataclasses.replace(arguments["model"], target="gguf:auto", size="7.5bpw")
    lqexport.export_model(path=tmp_path / "alone.gguf", **arguments | {"model": recipe})
    assert file_digest(tmp_path / "alone.gguf") == file_digest(next((tmp_path / "files").glob("*-auto-7.5bpw.gguf")))


def test_a_stopped_ladder_goes_on_and_ends_in_the_same_bytes(
    folder: Path, arguments: dict[str, Any], tmp_path: Path
) -> None:
    stages: list[str] = []

    def stop_in_the_second(stage: str, share: float) -> None:
        stages.append(stage)
        if stage.startswith("Run the file") and any(tmp_path.glob("*-Q4_0.gguf")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lqexport.make_ladder(folder=tmp_path, types=TYPES, listener=lqexport.Callback(stop_in_the_second), **arguments)
    assert not (tmp_path / "README.md").exists()
    made = lqexport.make_ladder(folder=tmp_path, types=TYPES, **arguments)
    assert [name.rpartition("-")[2] for name in made.seconds] == ["Q8_0.gguf"]
    assert names(tmp_path) == names(folder)
    for path in folder.glob("*.gguf"):
        assert file_digest(path) == file_digest(tmp_path / path.name)
    assert lines_of((tmp_path / "README.md").read_text()) == lines_of((folder / "README.md").read_text())


def test_a_file_that_fails_does_not_stop_the_others(folder: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    losses = [entry["kl"] for entry in json.loads((folder / "ladder.json").read_text())["files"]]
    made = lqexport.make_ladder(folder=tmp_path, types=TYPES, **arguments, max_kl=sum(losses) / 2)
    assert (made.passed, [path.name.rpartition("-")[2] for path in made.failed]) == (False, ["Q4_0.failed.gguf"])
    assert [step.target for step in made.steps] == ["gguf:Q8_0"]
    assert len(lines_of((tmp_path / "README.md").read_text())) == 1


def test_what_is_uploaded_is_what_passed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "files"
    shutil.copytree(folder, copy)
    for stray in ("notes.md", "settings.json"):
        (copy / stray).write_text("of no ladder")
    listed = upload_list(copy)
    assert {path.split("/")[0] for path in listed} == names(folder)
    file = next(copy.glob("*-Q4_0.gguf"))
    with file.open("ab") as changed:
        changed.write(b"x")
    with pytest.raises(lqexport.UserError, match="is not of these files"):
        upload_list(copy)


def test_one_ladder_at_a_time_is_made_in_a_folder(arguments: dict[str, Any], tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(lqexport.UserError, match="Another process is writing"):
        lqexport.make_ladder(folder=tmp_path, types=TYPES, **arguments)


def planned(folder: Path, arguments: dict[str, Any], types: list[str] = TYPES, **changes: Any) -> Ladder:
    return lqexport.make_ladder(folder=folder, types=types, **arguments | changes)


def test_what_is_no_ladder_is_said_before_work(folder: Path, arguments: dict[str, Any], tmp_path: Path) -> None:
    recipe = arguments["model"]
    with pytest.raises(lqexport.UserError, match=r"Q4_0\.gguf was made with another samples"):
        planned(folder, arguments, model=lqexport.Recipe(**vars(recipe) | {"samples": 3}))
    with pytest.raises(lqexport.UserError, match=r"was measured on short\.txt in lqexport"):
        planned(folder, arguments, text="python-heldout")
    with pytest.raises(lqexport.UserError, match="named twice"):
        planned(tmp_path, arguments, ["Q4_K_M", "q4km"])
    with pytest.raises(lqexport.UserError, match="needs a size"):
        planned(tmp_path, arguments, ["auto"])
    with pytest.raises(lqexport.UserError, match="at least one type"):
        planned(tmp_path, arguments, [])
    with pytest.raises(lqexport.UserError, match="named twice"):
        planned(tmp_path, arguments, ["Q4_0"], sizes=["7bpw", "7bpw "])
    with pytest.raises(lqexport.UserError, match="smallest types"):
        planned(tmp_path, arguments, [], sizes=["0.5bpw"])
    with pytest.raises(lqexport.UserError, match="Q9_K"):
        planned(tmp_path, arguments, ["Q4_0", "Q9_K"])
    (tmp_path / f"{Path(recipe.source).name}-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(lqexport.UserError, match="exists without its record"):
        planned(tmp_path, arguments)
    assert len(names(tmp_path)) == 1


def test_a_dry_run_has_a_line_for_every_file(smaller_model: Path, text: Path, short_text: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    texts = ["--calibration", str(text), "--text", str(short_text)]
    common = ["ladder", str(smaller_model), str(files), "--targets", "Q4_0,Q8_0", *texts, "--dry-run"]
    shown = CliRunner().invoke(app, common)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count(".gguf") == 2
    assert "all that is not there yet" in shown.stdout
    told = json.loads(CliRunner().invoke(app, [*common, "--json"]).stdout)
    assert [file["target"] for file in told] == ["gguf:Q4_0", "gguf:Q8_0"]
    assert all(file["estimated_seconds"] > 0 for file in told)
    assert not files.exists()


@pytest.mark.parametrize("effort", ["fast", "default"])
def test_a_dry_run_counts_once_what_files_share(arguments: dict[str, Any], effort: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(arguments["model"], effort=effort)

    def seconds(*sizes: str) -> list[float]:
        measurement = Measurement(arguments["text"], 1, "lqexport")
        rungs = planned_ladder(recipe, tmp_path, None, sizes, measurement, device="cpu")
        files = planned_files(rungs, "cpu", MemoryLimits(1 << 40, 1 << 40))
        return [file["estimated_seconds"] for file in files]

    first, second = seconds("7bpw", "7.5bpw")
    assert first == seconds("7bpw")[0]
    assert 0 < second < seconds("7.5bpw")[0]


def test_no_default_type_is_one_of_which_a_better_mix_is_known() -> None:
    assert not MEASURED.keys() & set(DEFAULT_TYPES)
    option = get_type_hints(ladder, include_extras=True)["targets"].__metadata__[0]
    assert option.show_default.startswith(",".join(DEFAULT_TYPES))
