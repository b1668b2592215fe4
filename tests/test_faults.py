"""Faults of disk, process and clock, and two runs at once: nothing is lost or half-written.

bench/faults.py injects faults into every file operation; here they hit a few.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lqexport.calibration.moments_cache import MomentsCache
from lqexport.errors import UserError
from lqexport.exporting import export
from lqexport.pipeline.kept_states import KeptStates
from lqexport.pipeline.measured_losses import MeasuredLosses
from lqexport.pipeline.quantize import quantize
from lqexport.recipe import Recipe
from lqexport.storage.files import claimed, written_whole


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs LD_PRELOAD and gcc")
def test_a_sample_of_all_faults(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "bench" / "faults.py"), "--work", str(tmp_path / "work")]
    command += ["--every", "1000", "--first", "12", "--only", "native"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == 0
    assert set(report["faults"]) == {"kill", "tear", "full", "unreadable", "interrupt"}
    assert min(report["faults"].values()) >= 2


def test_one_file_is_written_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with written_whole(path) as first:
        first.write(b"first")
        with pytest.raises(UserError, match="Another process is writing"), written_whole(path):
            pass
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_file_leaves_the_temporary_name_to_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, temporary = Path.replace, tmp_path / ".file.part"

    def then_another_begins(self: Path, target: Path) -> Path:
        replaced = replace(self, target)
        temporary.write_bytes(b"another process's")
        return replaced

    monkeypatch.setattr(Path, "replace", then_another_begins)
    with written_whole(tmp_path / "file") as file:
        file.write(b"ours")
    assert (tmp_path / "file").read_bytes() == b"ours"
    assert temporary.read_bytes() == b"another process's"


def test_who_does_not_get_a_folder_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find that there is no folder. One creates it and has written nothing yet when the other comes."""
    folder, make = tmp_path / "folder", Path.mkdir
    with contextlib.ExitStack() as first:

        def after_the_first(self: Path, **options: bool) -> None:
            monkeypatch.setattr(Path, "mkdir", make)
            first.enter_context(claimed(folder))
            make(self, **options)

        monkeypatch.setattr(Path, "mkdir", after_the_first)
        with pytest.raises(UserError, match="Another process is writing"), claimed(folder):
            pass
        assert folder.is_dir()


def test_a_claimed_folder_that_was_renamed_is_left_at_its_old_name(tmp_path: Path) -> None:
    folder = tmp_path / ".folder.part"
    with claimed(folder):
        folder.rename(tmp_path / "folder")
        folder.mkdir()  # by another process
    assert folder.is_dir()


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_bytes(b"a longer text than the new one")
    with written_whole(tmp_path / "file") as file:
        assert file.tell() == 0
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_run_killed_in_its_first_write_can_be_given_again(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".run.json.part").write_text("{")
    quantize(Recipe(str(tiny_model), "gguf:F16"), tmp_path / "out")
    assert not (tmp_path / "out" / ".run.json.part").exists()


def test_one_folder_is_written_by_one_process(tiny_model: Path, tmp_path: Path) -> None:
    recipe, out = Recipe(str(tiny_model), "gguf:F16"), tmp_path / "out"
    with claimed(out), pytest.raises(UserError, match="Another process is writing"):
        quantize(recipe, out)
    assert not out.exists()  # it stayed empty
    quantize(recipe, out)
    quantize(Recipe(str(tiny_model), "native:table-3", method="rtn"), tmp_path / "native")
    with claimed(tmp_path / ".folder.part"), pytest.raises(UserError, match="Another process is writing"):
        export(tmp_path / "native", tmp_path / "folder")
    export(tmp_path / "native", tmp_path / "folder")


def test_who_fills_a_shared_folder_waits_for_the_other(tmp_path: Path) -> None:
    """Whether the other process finishes its file, or fails and removes it."""
    cache = MomentsCache(tmp_path, {})
    block: dict[tuple[str, ...], torch.Tensor] = {("q", "k"): torch.ones(2, 2)}
    path = cache.folder / "block-0.safetensors"
    for fails in (False, True):
        threads = concurrent.futures.ThreadPoolExecutor()
        with threads, contextlib.suppress(KeyError), written_whole(path) as other:
            written = threads.submit(cache.write, (0, block))
            with pytest.raises(concurrent.futures.TimeoutError):
                written.result(timeout=0.2)
            other.write(b"the other's")
            if fails:
                raise KeyError
        written.result()
        assert cache.read(0)[1][("q", "k")].equal(torch.ones(2, 2))
        assert [path.name for path in cache.folder.iterdir()] == [path.name]


def test_losses_that_another_run_measures_meanwhile_stay(tmp_path: Path) -> None:
    """Both read what is known before either has written."""
    measured, path = MeasuredLosses(tmp_path), tmp_path / "a.json"
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with written_whole(path) as other:
            added = threads.submit(measured.add, "a", {"gguf:Q4_K": 0.5})
            with pytest.raises(concurrent.futures.TimeoutError):
                added.result(timeout=0.2)
            other.write(b'{"gguf:Q6_K": 0.25}')
        added.result()
    assert measured.losses() == {"a": {"gguf:Q4_K": 0.5, "gguf:Q6_K": 0.25}}


def test_two_runs_at_once_fill_one_cache(smaller_model: Path, text: Path, tmp_path: Path) -> None:
    """They begin together and measure the same types. Each writes the bytes that it writes alone."""
    few: dict[str, Any] = {"calibration": str(text), "samples": 2, "sequence_length": 32, "tune": 0}
    options = [part for key, value in few.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "lqexport", "quantize", str(smaller_model)]
    runs = [
        subprocess.Popen([*command, size, *options, "--size", size, "--cache", "cache"], cwd=tmp_path)
        for size in ("7bpw", "7.5bpw")
    ]
    assert [run.wait() for run in runs] == [0, 0]
    for size in ("7bpw", "7.5bpw"):
        alone = tmp_path / f"{size}-alone"
        quantize(Recipe(str(smaller_model), "gguf:auto", size=size, **few), alone)
        assert (tmp_path / size / "manifest.json").read_bytes() == (alone / "manifest.json").read_bytes()


def test_files_of_others_are_no_kept_states(tmp_path: Path) -> None:
    kept = KeptStates(tmp_path, 1)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "7").touch()
    kept.write(3, 0, {"hidden": torch.ones(2)})
    assert kept.last(9) == 3
    kept.write(5, 0, {"hidden": torch.ones(2)})
    kept.leave_only(5)
    assert {path.name for path in tmp_path.iterdir()} == {".DS_Store", "5", "7"}


def test_files_of_others_are_no_losses(tmp_path: Path) -> None:
    measured = MeasuredLosses(tmp_path)
    measured.add("a", {"gguf:Q4_K": 0.5})
    (tmp_path / "._a.json").write_bytes(b"\0")
    assert measured.losses() == {"a": {"gguf:Q4_K": 0.5}}


def test_a_locale_without_unicode_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('target = "gguf:F16"  # größe', encoding="utf-8")
    arguments = [str(tiny_model), "OUT", "--recipe", str(tmp_path / "recipe.toml")]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "lqexport", "quantize", *arguments]
    subprocess.run(command, cwd=tmp_path, env=os.environ | ascii_only, check=True)
    quantize(Recipe(str(tiny_model), "gguf:F16"), tmp_path / "here")
    digests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("OUT", "here")]
    assert digests[0] == digests[1]
