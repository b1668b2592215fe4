"""Memory limits decide where a run keeps its tensors and how much it does at once. The bytes of the result stay."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lqexport.calibration import collect
from lqexport.errors import UserError
from lqexport.pipeline.quantize import quantize
from lqexport.planning import memory
from lqexport.planning.cost import Work
from lqexport.planning.forecast import forecast
from lqexport.planning.memory import MemoryLimits
from lqexport.recipe import Recipe
from lqexport.runtime import tiles
from lqexport.runtime.placement import locations, mapped
from lqexport.runtime.progress import Callback
from lqexport.solver import cholesky as factorization
from lqexport.solver import feedback as solve
from lqexport.solver import solve_cpu
from lqexport.solver.cholesky import factorize
from lqexport.solver.linear import solve_linear

SMALL = {"samples": 6, "sequence_length": 32, "descent": 1, "tune": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"target": "gguf:Q2_K"},
    "guided": {"target": "gguf:Q2_K", "output_groups": 2},
    "tables": {"target": "native:table-2", "moments": "normalized"},
    "quantized prefix": {
        "target": "gguf:Q4_1",
        "moments": "plain",
        "prefix": "quantized",
        "asymmetric": False,
        "tune": 0,
    },
    "corrected": {"target": "gguf:Q3_K", "rank": 4, "tune": 0},
    "solved whole": {"target": "gptq:4-g128", "tune": 0},
    "experts": {"target": "gguf:Q4_0"},
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets small sizes: a matrix of the tiny model has several panels and tiles, and the sequences several shards."""
    monkeypatch.setattr(collect, "BATCH_TOKENS", 64)
    monkeypatch.setattr(factorization, "PANEL", 96)
    monkeypatch.setattr(memory, "PANEL", 96)
    monkeypatch.setattr(solve_cpu, "SPREAD_ROWS", 32)
    for module in (tiles, memory):
        monkeypatch.setattr(module, "ROW_TILE", 64)


@pytest.fixture
def hessian() -> Tensor:
    """A Hessian of correlated inputs, float32 [320, 320]."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(640, 320, generator=draw) @ torch.randn(320, 320, generator=draw)
    return inputs.T @ inputs / 640


def contents(folder: Path) -> dict[str, str]:
    """Returns path -> digest, for every file but the log, which holds times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bytes_in_no_room(
    name: str, tiny_model: Path, experts_model: Path, text: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        str(experts_model if name == "experts" else tiny_model), calibration=str(text), **SMALL | RECIPES[name]
    )
    messages: list[str] = []
    quantize(recipe, tmp_path / "much", device="cpu", limits=MemoryLimits())
    listener = Callback(lambda *_: None, messages.append)
    quantize(recipe, tmp_path / "little", device="cpu", limits=MemoryLimits(host=1), listener=listener)
    kept = "Second moments are kept on the disk, factors on the disk, and up to 64 rows"
    (said,) = (message for message in messages if kept in message)
    assert ("experts are solved in 5 parts" in said) == (name == "experts")
    assert contents(tmp_path / "much") == contents(tmp_path / "little")


def test_a_factor_in_panels_is_the_factor(hessian: Tensor, tmp_path: Path) -> None:
    """U^T U is the inverse of the damped Hessian. A factor that is kept on disk has the same bits."""
    cholesky = factorize(hessian, 0.01, True)
    assert [panel.shape for panel in cholesky.panels] == [(96, 96), (192, 96), (288, 96), (320, 32)]
    inverse = torch.linalg.inv(solve.damped(hessian.double(), 0.01))[cholesky.order][:, cholesky.order]
    upper = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(cholesky.rows(slice(0, 320)), upper.float())
    torch.testing.assert_close(cholesky.rows(slice(64, 160)), upper.float()[64:160, 64:])
    torch.testing.assert_close(cholesky.diagonal(), upper.diagonal())
    torch.testing.assert_close(cholesky.inverse_diagonal(), inverse.diagonal())
    right = torch.randn(5, 320, generator=torch.Generator().manual_seed(2))
    expected = right.double() @ torch.linalg.inv(solve.damped(hessian.double(), 0.01))
    torch.testing.assert_close(cholesky.solved(right).double(), expected, rtol=1e-3, atol=1e-5)
    kept = factorize(hessian, 0.01, True, lambda panel: mapped(panel, tmp_path))
    assert all(torch.equal(*pair) for pair in zip(cholesky.panels, kept.panels, strict=True))
    assert list(tmp_path.iterdir()) == []  # the files have no names


@pytest.mark.parametrize("name", ["gguf:Q4_K", "gguf:Q4_0", "native:table-3", "native:mxint-3-g32"])
@pytest.mark.parametrize("failures", [1, 2])
def test_where_memory_runs_out_fewer_rows_are_solved_at_once(
    name: str, failures: int, hessian: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, recipe = torch.randn(300, 256, generator=torch.Generator().manual_seed(1)), Recipe("", name, descent=1)
    whole = solve_linear("x", weight, hessian[:256, :256], name, recipe.solver_settings)
    tried = fail_first(monkeypatch, failures)
    again = solve_linear("x", weight, hessian[:256, :256], name, recipe.solver_settings)
    assert tried == {1: [300, 128, 128, 44], 2: [300, 128, 64, 64, 64, 64, 44]}[failures]
    assert again.facts == whole.facts
    assert all((plane == again.planes[key]).all() for key, plane in whole.planes.items())


def fail_first(monkeypatch: pytest.MonkeyPatch, failures: int) -> list[int]:
    """Makes the first calls of error feedback run out of memory. Returns the list of the rows of each call."""
    tried: list[int] = []
    feedback = solve.feedback

    def failing(weights: Tensor, *rest: Any) -> Tensor:
        tried.append(len(weights))
        if len(tried) <= failures:
            raise torch.OutOfMemoryError("injected")
        return feedback(weights, *rest)

    monkeypatch.setattr("lqexport.solver.linear.feedback", failing)
    return tried


def test_less_than_a_tile_is_refused(hessian: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_first(monkeypatch, 100)
    with pytest.raises(UserError, match="64 rows of a linear, the fewest"):
        solve_linear("x", torch.randn(300, 320), hessian, "gguf:Q4_0", Recipe("", "gguf:Q4_0").solver_settings)


def test_what_a_device_has_no_room_for_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location, tensor = locations(torch.device("meta"), tmp_path)[0], torch.randn(4, 4)
    move = Tensor.to

    def full(self: Tensor, device: Any) -> Tensor:
        if device == torch.device("meta"):
            raise torch.OutOfMemoryError("injected")
        return move(self, device)

    monkeypatch.setattr(Tensor, "to", full)
    assert torch.equal(location.keep(tensor), tensor)


def work_of(name: str, **options: Any) -> Work:
    path = Path(__file__).parent / "configs" / f"{name}.json"
    return forecast(path, Recipe(str(path), "gguf:Q4_K_M", **options), None, None).work


def test_less_memory_keeps_more_elsewhere() -> None:
    """A placement takes no more of the device than those before it that solve as many rows at once."""
    ways = list(memory.placements(work_of("llama-3.1-70b"), torch.device("cuda"), Path()))
    kept = [(placement.moments.name, placement.cholesky.name) for placement in ways if placement.rows == tiles.ROW_TILE]
    assert kept == [("device", "device"), ("host", "device"), ("host", "host"), ("disk", "host"), ("disk", "disk")]
    needed = [memory.memory(work_of("llama-3.1-70b"), placement)[memory.SOLVING] for placement in ways]
    least = [stage for stage, placement in zip(needed, ways, strict=True) if placement.rows == tiles.ROW_TILE]
    assert [stage.device for stage in least] == sorted((stage.device for stage in least), reverse=True)
    assert least[-1].host < least[2].host


def test_the_first_way_that_fits_is_taken() -> None:
    work, gpu = work_of("llama-3.1-70b"), torch.device("cuda")
    ways = list(memory.placements(work, gpu, Path()))
    assert memory.choose_placement(work, gpu, Path(), MemoryLimits()) == ways[0]
    for index in (3, len(ways) - 1):
        stages = memory.memory(work, ways[index])
        most = memory.peak({name: stages[name] for name in (memory.PASSING, memory.SOLVING)})
        assert ways.index(memory.choose_placement(work, gpu, Path(), MemoryLimits(most.device, most.host))) <= index
    assert memory.choose_placement(work, gpu, Path(), MemoryLimits(1, 1)) == ways[-1]


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b"])
def test_a_gpus_run_keeps_what_there_is_room_for(name: str) -> None:
    """Hidden states and unpacked tensors are kept in memory within the limits; without limits, all of them."""
    work, gpu = work_of(name, prefix="full", tune=64), torch.device("cuda")
    endless = memory.choose_placement(work, gpu, Path(), MemoryLimits())
    assert endless.states
    weights = sum(tensor.weights for tensor in work.linears)
    most = memory.peak(memory.memory(work, endless))
    assert most.device > weights
    memory_limits = MemoryLimits(24 * 10**9, most.host // 2)
    limited = memory.choose_placement(work, gpu, Path(), memory_limits)
    assert (endless.hidden.name, limited.hidden.name) == ("device", "device")
    first = memory.memory(work, next(memory.placements(work, gpu, Path())))
    just_enough = max(first[name].device for name in (memory.PASSING, memory.SOLVING))
    assert memory.choose_placement(work, gpu, Path(), MemoryLimits(just_enough)).hidden.name == "host"
    assert 0 < sum(limited.unpacked) < memory_limits.device + memory_limits.host
    for stage in memory.memory(work, limited).values():
        assert not memory_limits.excess(stage, gpu)
    assert not memory.choose_placement(work, gpu, Path(), MemoryLimits(24 * 10**9, memory.PROCESS_BYTES)).states
    assert memory.choose_placement(work, torch.device("cpu"), Path(), MemoryLimits()).unpacked == (0, 0)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match="No room for 64 bytes"):
        mapped(torch.randn(4, 4), tmp_path)
