"""Several processes on one run write the bytes of one process, even if one is killed and others go on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lqexport.calibration.collect import SHARDS, batches, sharded
from lqexport.calibration.moments import SecondMoments
from lqexport.runtime import tiles
from lqexport.runtime.processes import Processes
from lqexport.storage.artifact import Artifact

CPU = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    "guided": {"tune": 2, "output_groups": 2},
    "l2qer": {"moments": "normalized", "rank": 4, "scaling": "l2qer", "factor_bytes": 20_000},
    "rtn": {"method": "rtn"},
    "size": {"target": "gguf:auto", "size": "5bpw"},
    "quantized prefix": {"prefix": "quantized", "moments": "plain", "asymmetric": False},
    "default": {"tune": None},
    "asymmetric guided": {"moments": "guided", "sequence_length": 96},
    "exl2": {"target": "exl2", "bits": 4.0, "moments": "plain"},
    "experts": {"target": "gguf:Q4_0"},
    "experts, normalized": {"target": "gguf:Q4_0", "moments": "normalized"},
}
ON_A_DEVICE = ("guided", "l2qer", "quantized prefix", "default", "asymmetric guided", "experts")


@pytest.fixture
def options(tiny_model: Path, text: Path) -> dict[str, Any]:
    """Options of a recipe whose sequences make three shards, the last one smaller."""
    small = {"samples": 40, "sequence_length": 64, "descent": 0, "tune": 0}
    return {"source": str(tiny_model), "target": "gguf:Q2_K", "calibration": str(text), **small}


def contents(folder: Path) -> dict[str, str]:
    """Returns path -> digest, for every file but the log, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def started(arguments: Sequence[object], processes: int = 1) -> subprocess.Popen[bytes]:
    """Starts Python with these arguments, in one process or in several under torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    return subprocess.Popen([sys.executable, *map(str, [*several, *arguments])])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_processes_write_the_bytes_of_one(
    device: str, options: dict[str, Any], smaller_model: Path, experts_model: Path, root: Path, tmp_path: Path
) -> None:
    """Runs with so little memory that the experts of a block are solved one at a time.

    On pretended devices, a CPU tensor among those that the processes exchange raises.
    """
    recipes = {name: options | changed for name, changed in RECIPES.items()}
    if device == "cuda":  # its solver is torch alone here, and slow
        recipes = {name: recipes[name] | {"source": str(smaller_model), "target": "gguf:Q4_0"} for name in ON_A_DEVICE}
    for name in recipes:
        if "experts" in name:
            recipes[name]["source"] = str(experts_model)
    running = []
    for count in (1, 2):
        plan = [[recipe, str(tmp_path / str(count) / name)] for name, recipe in recipes.items()]
        (tmp_path / f"{count}.json").write_text(json.dumps(plan))
        running.append(started([root / "tests" / "quantize_all.py", tmp_path / f"{count}.json", device], count))
    assert [process.wait() for process in running] == [0, 0]
    for name in recipes:
        assert contents(tmp_path / "1" / name) == contents(tmp_path / "2" / name), name


def test_one_of_two_is_killed_and_three_go_on(options: dict[str, Any], tmp_path: Path) -> None:
    keys = ("samples", "sequence_length", "descent", "tune", "target", "calibration")
    arguments = [argument for key in keys for argument in (f"--{key.replace('_', '-')}", options[key])]
    source, whole = options["source"], tmp_path / "whole"
    command = ["-m", "lqexport", "quantize", source, tmp_path / "out", *arguments, "--device", "cpu"]
    running = started(command, 2)
    while not list((tmp_path / "out" / "tensors").glob("*layers.1.*proj*")):
        assert running.poll() is None
        time.sleep(0.01)
    (second,) = (child for child in psutil.Process(running.pid).children() if child.environ().get("RANK") == "1")
    second.kill()
    assert running.wait() != 0
    assert not Artifact(tmp_path / "out").complete
    assert started(command, 3).wait() == 0
    assert started(["-m", "lqexport", "quantize", source, whole, *arguments, "--device", "cpu"]).wait() == 0
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 29])
def test_shards_are_all_the_batches_in_order(count: int) -> None:
    tokens = torch.arange(count * 1024).reshape(count, 1024)
    shards = sharded(tokens)
    assert len(shards) == min(count, SHARDS)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    torch.testing.assert_close([batch for shard in shards for batch in shard], batches(tokens))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_shard_has_its_turn_in_order(count: int) -> None:
    turns = [list(Processes(rank, count).rounds(4)) for rank in range(count)]
    order = [shard for turn in zip(*turns, strict=True) for shard, _ in turn if shard is not None]
    assert order == [0, 1, 2, 3]
    for turn in zip(*turns, strict=True):
        assert {senders for _, senders in turn} == {sum(shard is not None for shard, _ in turn)}


def test_a_total_is_of_the_shards_in_order() -> None:
    """The total adds the shards' sums, not all tokens one after the other. float32 sums depend on the order."""
    shards = torch.randn(3, 256, 64, generator=torch.Generator().manual_seed(0))
    whole, alone = SecondMoments(64, "plain", CPU), [SecondMoments(64, "plain", CPU) for _ in shards]
    for shard, single in zip(shards, alone, strict=True):
        for batch in shard.split(64):
            whole.add(batch)
            single.add(batch)
        whole.end_shard()
    first, second, third = (single.hessian() * 256 for single in alone)
    assert torch.equal(whole.hessian(), (first + second + third) / 768)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_tiles_are_dealt_out_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile goes to one process. Numbers of tiles differ by at most one, and the first process has the most."""
    monkeypatch.setattr(tiles, "ROW_TILE", 64)
    rows = [200, 64, 1, 96]
    shares = tiles.dealt(rows, count)
    runs = [run for share in shares for run in share]
    covered = [(number, row) for number, run in runs for row in range(run.start, run.stop)]
    assert covered == [(number, row) for number, row_count in enumerate(rows) for row in range(row_count)]
    assert all(run.start % 64 == 0 and (run.stop % 64 == 0 or run.stop == rows[number]) for number, run in runs)
    sizes = [sum(-(-(run.stop - run.start) // 64) for _, run in share) for share in shares]
    assert sum(sizes) == 8
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)
