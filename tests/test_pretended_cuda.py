"""Whole runs on a pretended CUDA device (tests/cudacpu/device.py), on which a tensor on the wrong device raises.

The runs use torch alone, as on a machine without CuPy, or the CUDA kernels, which the harness runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from random_exl3 import random_artifact
from torch import Tensor

from lqexport.converters.exl2 import writer as exl2_writer
from lqexport.converters.exl3 import writer as exl3_writer
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.formats.registry import codec_named
from lqexport.grids import fit_sections
from lqexport.grids.fit import fit, minmax
from lqexport.grids.fit_sections import minmax_sections
from lqexport.kernels import (
    cuda,
    cuda_decode,
    cuda_exl2,
    cuda_exl3,
    cuda_kmeans,
    cuda_solve,
    cuda_squared,
    cuda_vectors,
)
from lqexport.pipeline import exl2_mixes
from lqexport.pipeline.quantize import quantize
from lqexport.planning.memory import MemoryLimits
from lqexport.recipe import Recipe
from lqexport.solver import cholesky, feedback
from lqexport.solver.cholesky import factorize
from lqexport.solver.linear import solve_linear, unit_of
from lqexport.storage.artifact import Artifact
from lqexport.tuning import tune
from lqexport.tuning.tensor_cache import TensorCache
from lqexport.verification.verifying import verify

Launched = list[str]
GRIDS = ["gguf:Q2_K", "gguf:Q3_K", "gguf:Q4_1", "gguf:IQ4_XS", "native:affine-3-g64", "native:table-2",
         "native:mxint-3-g32", "gguf:IQ2_XS"]  # fmt: skip
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def device(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("tests/cudacpu/device.py")


@pytest.fixture
def pretended(device: ModuleType) -> Iterator[Any]:
    """The mode in which torch sees the pretended device. It is active during the test."""
    with device.PretendedCuda() as mode:
        yield mode
    cuda_exl2._units.cache_clear()


@pytest.fixture
def launched(kernels_on: Callable[..., str], device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Makes the CUDA kernels run on the pretended device. The list of their names grows as they are launched."""
    kernels_on(
        "plain",
        {
            **cuda_solve.KERNELS,
            cuda_vectors.SOURCE: cuda_vectors.KERNELS,
            cuda_kmeans.SOURCE: [cuda_kmeans.KERNEL],
            cuda_squared.SOURCE: [cuda_squared.KERNEL],
            cuda_exl2.SOURCE: cuda_exl2.kernels(),
            cuda_exl3.SOURCE: cuda_exl3.kernels(),
            cuda_decode.SOURCE: cuda_decode.kernels(),
        },
    )
    names: Launched = []
    run = cuda.launch

    def launch(
        source: str, kernel: str, blocks: int, threads: int, arguments: list[Any], shared_bytes: int = 0
    ) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        assert all(tensor.device.type == "cuda" and tensor.is_contiguous() for tensor in tensors)
        names.append(kernel.split("<")[0])
        plain = [device.plain(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
        with torch._C.DisableTorchFunction():
            run(source, kernel, blocks, threads, plain, shared_bytes)

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "usable", lambda device: device.type == "cuda")
    return names


@pytest.fixture(params=["torch", "kernels"])
def way(request: pytest.FixtureRequest) -> str:
    """How the run computes: `torch` alone, or by the `kernels`."""
    if request.param == "kernels":
        request.getfixturevalue("launched")
    return request.param


# The device itself.

MIXED: dict[str, Callable[[Tensor], Any]] = {
    "a sum": lambda x: x + torch.ones(4, 4),
    "a product": lambda x: torch.ones(4, 4) @ x,
    "parts": lambda x: torch.cat([x, torch.ones(4, 4)]),
    "a choice": lambda x: torch.where(x > 0, x, torch.ones(4)),
    "in place": lambda x: x.add_(torch.ones(4, 4)),
    "into brackets": lambda x: x.__setitem__(0, torch.ones(4)),
    "a loss": lambda x: torch.nn.functional.kl_div(x, torch.ones(4, 4)),
    "a linear": lambda x: torch.nn.Linear(4, 4)(x),
    "a gradient": lambda x: (x * x.clone().requires_grad_()).backward(torch.ones(4, 4)),
}


@pytest.mark.parametrize("operation", MIXED)
def test_what_mixes_devices_raises(operation: str, pretended: Any) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[operation](torch.randn(4, 4, device=CUDA))


def test_what_a_device_takes_from_the_cpu_is_taken(pretended: Any) -> None:
    x = torch.randn(4, 4).to(CUDA)
    with pytest.raises(TypeError, match="cuda:0"):
        x.numpy()
    x.copy_(torch.ones(4, 4))
    made = [x * torch.tensor(2.0), x[torch.tensor([0, 2])], torch.as_tensor([1.0], device=CUDA), torch.zeros_like(x)]
    assert [tensor.device.type for tensor in made] == ["cuda"] * 4
    assert x.cpu().numpy().sum() == 16
    assert x.cpu().device.type == torch.zeros_like(x, device="cpu").device.type == "cpu"


def test_what_the_device_replaces_comes_back(device: ModuleType) -> None:
    """It comes back even if the mode is entered again meanwhile, as a gradient's hook does."""
    before = torch.autocast, torch.cuda.device_count, torch.cuda.mem_get_info
    with device.PretendedCuda() as mode:
        for _ in range(2):
            with mode:
                assert torch.cuda.device_count() == 1
            assert torch.autocast is not before[0]
    assert (torch.autocast, torch.cuda.device_count, torch.cuda.mem_get_info) == before


def test_gradients_are_on_the_device(pretended: Any) -> None:
    seen = []
    layer = torch.nn.Linear(4, 4).to(CUDA)
    output = layer(torch.randn(2, 4, device=CUDA))
    output.register_hook(lambda gradient: seen.append(gradient.device.type))
    output.sum().backward()
    assert layer.weight.grad is not None
    assert [layer.weight.grad.device.type, *seen] == ["cuda", "cuda"]
    output = layer(torch.randn(2, 4, device=CUDA))
    output.register_hook(lambda gradient: gradient + torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="same device"):
        output.sum().backward()


# One linear.


@pytest.mark.parametrize("name", GRIDS)
def test_every_kind_of_grid(name: str, way: str, pretended: Any) -> None:
    weights, inputs = torch.randn(2, 256, device=CUDA), torch.randn(300, 256, device=CUDA)
    hessian = inputs.T @ inputs
    cholesky_factor = factorize(hessian.double(), 0.05, True, unit=unit_of([name]))
    damped = feedback.damped(hessian, 0.05)
    assert minmax(codec_named(name), weights).levels.device.type == "cuda"
    grid = fit(codec_named(name), weights, hessian.diagonal())
    codes = feedback.feedback(weights, grid, cholesky_factor)
    before = feedback.layer_loss(grid.values(codes) - weights, damped)
    grid, codes = feedback.refine(weights, damped, grid, codes, sweeps=1, refit=True)
    assert grid.values(codes).device.type == grid.nearest(weights).device.type == "cuda"
    assert feedback.layer_loss(grid.values(codes) - weights, damped) <= before


def test_exl2s_range(pretended: Any) -> None:
    grid = minmax_sections(
        codec_named("exl2:8g32x1+3g32x1"), torch.randn(32, 64, device=CUDA), torch.arange(64).to(CUDA)
    )
    assert {part.maxima.device.type for part in grid.sections} == {"cuda"}


# Whole runs.


@pytest.fixture
def recipe(smaller_model: Path, text: Path) -> Recipe:
    return Recipe(
        str(smaller_model), "gguf:Q4_0", calibration=str(text), samples=2, sequence_length=32, descent=1, tune=0
    )


def changed(recipe: Recipe, **options: Any) -> Recipe:
    return Recipe(**{**recipe.__dict__, **options})


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], dict[str, float]]:
    """A function that returns each linear's loss of a run on the CPU. Passes use the dtype of a device."""

    @cache
    def losses(key: str) -> dict[str, float]:
        return losses_of(quantize(recipes[key], tmp_path_factory.mktemp("cpu") / "out", device="cpu"))

    recipes: dict[str, Recipe] = {}

    def losses_on_cpu(recipe: Recipe) -> dict[str, float]:
        recipe = changed(recipe, compute_dtype="bfloat16")  # a device's default
        recipes[repr(recipe)] = recipe
        return losses(repr(recipe))

    return losses_on_cpu


def losses_of(report: dict[str, Any]) -> dict[str, float]:
    return {tensor["name"]: tensor["loss"] for tensor in report["tensors"] if "loss" in tensor}


TARGETS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "gguf:Q4_0": ({"tune": 2}, {"fit_groups", "feedback_block", "refine_block"}),
    "native:table-3": ({"tune": 2}, {"kmeans", "feedback_block", "refine_block"}),
    "exl2": ({"bits": 3.3}, {"best_subs", "feedback_block", "refine_block"}),
}
"""Target -> the recipe's options, and the kernels that solving launches. Moments are guided."""


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_run(
    target: str, way: str, recipe: Recipe, on_the_cpu: Callable[[Recipe], dict[str, float]], pretended: Any,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    options, kernels = TARGETS[target]
    monkeypatch.setattr(fit_sections, "COARSE", (0.8, 1.0))  # torch alone would try all of them for a minute
    monkeypatch.setattr(exl2_mixes, "AVERAGES", (2.5, 3.5))
    recipe = changed(recipe, target=target, **options)
    torch.set_float32_matmul_precision("high")  # TF32, which the run must not take over
    report = quantize(recipe, tmp_path / "out", device="cuda")
    assert report["run"]["device"] == "cuda"
    assert set(pretended.products) <= {(torch.float32, "highest"), (torch.float64, "highest")}
    assert (torch.float32, "highest") in pretended.products
    assert losses_of(report) == pytest.approx(on_the_cpu(recipe), rel=0.1)
    if way == "kernels":
        assert set(request.getfixturevalue("launched")) == kernels


@pytest.mark.parametrize(
    "options",
    [
        {"prefix": "quantized", "moments": "guided", "asymmetric": True},
        {"output_groups": 2, "act_order": False, "importance": "cholesky"},
        {"target": "gguf:auto", "size": "7bpw"},
        {"rank": 4, "descent": 0, "target": "native:mxint-3-g32"},
        {"rank": 2, "descent": 0, "scaling": "l2qer", "factor_bytes": 3000},
    ],
    ids=["asymmetric", "output groups", "size", "low rank", "low rank shared"],
)
def test_other_recipes(
    options: dict[str, Any], recipe: Recipe, on_the_cpu: Callable[[Recipe], dict[str, float]], pretended: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    recipe = changed(recipe, **options)
    assert losses_of(quantize(recipe, tmp_path / "out", device="cuda")).keys() == on_the_cpu(recipe).keys()


@pytest.mark.parametrize("host", [1 << 40, 1], ids=["the host", "files"])
def test_the_same_bytes_where_the_device_keeps_nothing(
    host: int, recipe: Recipe, pretended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cholesky, "PANEL", 48)
    recipe = changed(recipe, tune=1)
    names = []
    for name, memory_limits in (("much", MemoryLimits()), ("little", MemoryLimits(1, host))):
        quantize(recipe, tmp_path / name, device="cuda", limits=memory_limits)
        names.append({entry["name"]: entry["sha256"] for entry in Artifact(tmp_path / name).manifest().values()})
    assert names[0] == names[1]


def test_a_stopped_run_goes_on(recipe: Recipe, pretended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is stopped during tuning. Its second moments come from a cache."""
    recipe, cached = changed(recipe, tune=3, method="gptq"), tmp_path / "cache"
    whole = quantize(recipe, tmp_path / "whole", device="cuda", cache=cached)
    monkeypatch.setattr(tune, "SAVE_EVERY", 1)
    steps, step = [1], tune.Tuner._step

    def until(self: tune.Tuner, *arguments: Any) -> None:
        if not steps:
            raise KeyboardInterrupt
        steps.pop()
        step(self, *arguments)

    monkeypatch.setattr(tune.Tuner, "_step", until)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out", device="cuda", cache=cached)
    monkeypatch.setattr(tune.Tuner, "_step", step)
    assert quantize(recipe, tmp_path / "out", device="cuda", cache=cached) == whole


# Verification.


@pytest.mark.parametrize(("target", "options"), [("gguf:Q4_0", {}), ("exl2", {"bits": 3.3}), ("native:table-3", {})])
def test_a_written_file_is_verified(
    target: str, options: dict[str, Any], recipe: Recipe, text: Path, launched: Launched,
    pretended: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """The file's model runs on the device, and the kernels decode every tensor to NumPy's bits."""
    recipe = changed(recipe, target=target, method="gptq", moments="normalized", **options)
    quantize(recipe, tmp_path / "out", device="cpu")
    path = tmp_path / "out"
    if not target.startswith("native:"):
        path = tmp_path / "model.gguf"
        (exl2_writer if target == "exl2" else gguf_writer).write(Artifact(tmp_path / "out"), path)
    result = verify(path, recipe.source, text=str(text), protocols=("llama.cpp-512",), windows=1, device="cuda")
    count = len(result.tensors)
    assert result.decoding == f"NumPy and the CUDA kernels, the same bits in {count} of {count} tensors"
    assert result.failed == []
    assert set(launched) == ({"decode", "decode_exl2"} if target == "exl2" else {"decode"})


@pytest.fixture
def walks(recipe: Recipe, tmp_path: Path) -> Artifact:
    """An artifact in EXL3 with random linears."""
    return random_artifact(changed(recipe, target="exl3:2.5", method="gptq"), tmp_path / "walks")


def test_a_written_folder_of_walks_is_verified(
    walks: Artifact, recipe: Recipe, text: Path, launched: Launched, pretended: Any, tmp_path: Path
) -> None:
    exl3_writer.write(walks, tmp_path / "model")
    arguments = {"text": str(text), "protocols": ("llama.cpp-512",), "windows": 1, "max_over_expected": None}
    result = verify(tmp_path / "model", recipe.source, device="cuda", **arguments)
    count = len(result.tensors)
    assert result.decoding == f"NumPy and the CUDA kernels, the same bits in {count} of {count} tensors"
    assert result.failed == []
    assert set(launched) == {"decode", "decode_exl3"}


def test_walks_are_decoded_on_the_device_for_tuning(walks: Artifact, launched: Launched, pretended: Any) -> None:
    """They are decoded once if the host has room for them."""
    name = "model.layers.0.self_attn.k_proj.weight"
    expected = TensorCache(walks, torch.device("cpu"), (0, 0))[name]
    cache = TensorCache(walks, CUDA, (0, 1 << 20))
    for unpacked in (cache[name], cache[name]):
        assert unpacked.codes.device.type == unpacked.grid.inputs.device.type == "cuda"
        assert torch.equal(unpacked.codes.cpu(), expected.codes)
        assert torch.equal(unpacked.grid.outputs.cpu(), expected.grid.outputs)
    assert launched == ["decode_exl3"]


def test_walks_are_searched_for_weights_on_the_device(pretended: Any) -> None:
    weight, inputs = torch.randn(128, 128), torch.randn(300, 128)
    hessian, settings = inputs.T @ inputs, Recipe("model", "exl3:2", descent=1).solver_settings
    there = solve_linear("linear", weight.to(CUDA), hessian.to(CUDA), "exl3:2", settings)
    here = solve_linear("linear", weight, hessian, "exl3:2", settings)
    assert there.facts["loss"] == pytest.approx(here.facts["loss"], rel=0.03)
