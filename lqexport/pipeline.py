"""`quantize`: decoder block by decoder block, from a source to a finished artifact.

For each block: its inputs for all calibration sequences, the second moments of the inputs of its linears, then each
linear solved, packed and written. The next block's inputs come from the full-precision blocks (`prefix = "full"`:
linears are independent of each other), or from the quantized ones, linears in the order in which data flows
(`prefix = "quantized"`: true-sequential, as GPTQ and LeanQuant). A finished linear is never solved again: a resumed run
repeats the forward passes, which give the same bits, and reads what is done.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lqexport.artifact import Artifact
from lqexport.blocks import BlockModel
from lqexport.calibration import Calibration, load_calibration
from lqexport.converters.plan import PlannedTensor
from lqexport.converters.targets import plan
from lqexport.environment import choose_device, versions
from lqexport.formats.codec import GridCodec
from lqexport.formats.registry import codec
from lqexport.linear import round_tensor, solve_linear
from lqexport.moments import SecondMoments
from lqexport.progress import Listener, Silent
from lqexport.recipe import Recipe
from lqexport.source import Source, open_source

BATCH_TOKENS = 1024
"""Tokens in one forward pass on the CPU; larger batches are no faster there and take more memory."""
GPU_BATCH_TOKENS = 8192


def plan_recipe(source: Source, recipe: Recipe) -> list[PlannedTensor]:
    """What every tensor of the source will be stored as."""
    shapes = {name: source.shape(name) for name in source.names()}
    return plan(recipe.target, source.config, shapes, embedding_type=recipe.embedding_type,
                output_type=recipe.output_type, fallback=recipe.fallback)  # fmt: skip


def quantize(recipe: Recipe, out: Path, *, device: str = "auto", listener: Listener | None = None) -> dict[str, Any]:
    """Quantize `recipe.source` into the artifact folder `out`, or finish what an interrupted run began there.

    Returns the report that is also written to report.json. Raises UserError for bad input.
    """
    run = _Run(recipe, out, choose_device(device), listener or Silent())
    if not run.artifact.complete:
        with torch.no_grad():
            run.round_others()
            run.solve_linears()
        run.finish()
    return run.artifact.report()


class _Run:
    """The state of one call of `quantize`."""

    def __init__(self, recipe: Recipe, out: Path, device: torch.device, listener: Listener) -> None:
        self.recipe, self.device, self.listener = recipe, device, listener
        self.source = open_source(recipe.source)
        self.planned = plan_recipe(self.source, recipe)
        self.linears = {tensor.name: tensor for tensor in self.planned if tensor.linear}
        self.calibration = self._calibration()
        self.artifact = Artifact(out)
        self.artifact.begin(self._identity())
        self.source.copy_model_files(self.artifact.model_folder)

    def _calibration(self) -> Calibration | None:
        """None where nothing is solved: rounding needs no calibration, and plain types have no grid."""
        solved = any(isinstance(codec(tensor.codec), GridCodec) for tensor in self.linears.values())
        if self.recipe.method == "rtn" or not solved:
            return None
        recipe = self.recipe
        return load_calibration(recipe.calibration, self.source.tokenizer(), samples=recipe.samples,
                                sequence_length=recipe.sequence_length, seed=recipe.seed)  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        return {
            "versions": versions("lqexport", "torch", "transformers", "numpy", "numba"),
            "recipe": asdict(self.recipe),
            "source_fingerprint": self.source.fingerprint,
            "device": self.device.type,
            "calibration": self.calibration.facts() if self.calibration else None,
        }

    def round_others(self) -> None:
        """Store what the solver does not work on."""
        others = [tensor for tensor in self.planned if not tensor.linear]
        self.listener.stage("Rounding embeddings and norms", sum(tensor.weights for tensor in others))
        for tensor in others:
            if tensor.name not in self.artifact:
                weight = self.source.read(tensor.name).to(self.device)
                self.artifact.write(round_tensor(tensor.name, weight, tensor.codec))
            self.listener.advance(tensor.weights)

    def solve_linears(self) -> None:
        self.listener.stage("Quantizing", sum(tensor.weights for tensor in self.linears.values()))
        if self.calibration is None:
            for name in self.linears:
                self._solve(name, self.source.read(name), None)
            return
        model = BlockModel(self.source, self.device)
        inputs = self._embed(model, self.calibration.tokens)
        last = self._last_unfinished(model)
        for index, block in model.blocks():
            if index > last:
                break
            prefix = f"{model.architecture.blocks}.{index}."
            step = self._block_full if self.recipe.prefix == "full" else self._block_quantized
            step(model, block, prefix, inputs)
        done = sum(tensor.weights for name, tensor in self.linears.items() if int(_block_of(name, model)) > last)
        self.listener.advance(done)

    def _embed(self, model: BlockModel, tokens: Tensor) -> list[Tensor]:
        """Hidden states that enter the first block, a batch at a time, kept on the host."""
        budget = BATCH_TOKENS if self.device.type == "cpu" else GPU_BATCH_TOKENS
        batches = tokens.split(max(1, budget // tokens.shape[1]))
        return [model.start(batch).cpu() for batch in batches]

    def _last_unfinished(self, model: BlockModel) -> int:
        """Index of the last block with something left to solve; -1 if there is none."""
        return max((int(_block_of(name, model)) for name in self.linears if name not in self.artifact), default=-1)

    def _block_full(self, model: BlockModel, block: nn.Module, prefix: str, inputs: list[Tensor]) -> None:
        """Second moments of all linears in the one pass that also gives the next block's inputs."""
        wanted = [group for group in model.architecture.linears if self._unfinished(prefix, group)]
        moments = self._forward(model, block, inputs, wanted, keep=True)
        for group in wanted:
            self._solve_group(block, prefix, group, moments[group])
        self._advance_finished(prefix, [group for group in model.architecture.linears if group not in wanted])

    def _block_quantized(self, model: BlockModel, block: nn.Module, prefix: str, inputs: list[Tensor]) -> None:
        """One pass for each group of linears, those before it already quantized; then one for the outputs."""
        for group in model.architecture.linears:
            if self._unfinished(prefix, group):
                moments = self._forward(model, block, inputs, [group], keep=False)
                self._solve_group(block, prefix, group, moments[group])
            else:
                self._advance_finished(prefix, [group])
            for linear in group:
                self._carry_forward(_linear(block, linear), prefix + linear + ".weight")
        self._forward(model, block, inputs, [], keep=True)

    def _forward(
        self, model: BlockModel, block: nn.Module, inputs: list[Tensor], groups: list[tuple[str, ...]], *, keep: bool
    ) -> dict[tuple[str, ...], SecondMoments]:
        """Run every batch through the block, adding up the inputs of each group; `keep` replaces inputs by outputs."""
        with _moments_of(block, groups, self._new_moments) as moments:
            for i, batch in enumerate(inputs):
                output = model.run(block, batch.to(self.device))
                if keep:
                    inputs[i] = output.cpu()
        return moments

    def _new_moments(self, columns: int) -> SecondMoments:
        return SecondMoments(columns, self.recipe.moments, self.device)

    def _unfinished(self, prefix: str, group: tuple[str, ...]) -> bool:
        return any(f"{prefix}{linear}.weight" not in self.artifact for linear in group)

    def _advance_finished(self, prefix: str, groups: list[tuple[str, ...]]) -> None:
        names = [f"{prefix}{linear}.weight" for group in groups for linear in group]
        self.listener.advance(sum(self.linears[name].weights for name in names if name in self.linears))

    def _solve_group(self, block: nn.Module, prefix: str, group: tuple[str, ...], moments: SecondMoments) -> None:
        hessian = moments.hessian()
        for linear in group:
            if f"{prefix}{linear}.weight" in self.linears:  # a shape that no grid holds is stored already, as F16
                self._solve(f"{prefix}{linear}.weight", _linear(block, linear).weight.data, hessian)

    def _solve(self, name: str, weight: Tensor, hessian: Tensor | None) -> None:
        tensor = self.linears[name]
        if name not in self.artifact:
            began = time.perf_counter()
            solved = solve_linear(name, weight.to(self.device).float(), hessian, tensor.codec, self.recipe)
            self.artifact.write(solved)
            self.artifact.log({"name": name, "seconds": round(time.perf_counter() - began, 3), **solved.facts})
        self.listener.advance(tensor.weights)

    def _carry_forward(self, linear: nn.Linear, name: str) -> None:
        """Go on with the weights as the file decodes them."""
        stored = self.artifact.read(name)
        values = codec(stored.codec).decode(stored.planes, stored.shape[1])
        linear.weight.data = torch.from_numpy(values).to(linear.weight)

    def finish(self) -> None:
        tensors = []
        for tensor in self.planned:
            entry = {"name": tensor.name, "codec": tensor.codec, "shape": list(tensor.shape), "bytes": tensor.nbytes}
            if tensor.reason:
                entry |= {"wanted": tensor.wanted, "reason": tensor.reason}
            tensors.append(entry | self.artifact.facts(tensor.name))
        report = {"run": self._identity(), "tensors": tensors, "bits_per_weight": _bits_per_weight(self.planned)}
        self.artifact.finish([tensor.name for tensor in self.planned], report)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.artifact.log({"finished": True, "peak_memory_gib": round(peak, 3)})


def _bits_per_weight(planned: list[PlannedTensor]) -> float:
    return 8 * sum(tensor.nbytes for tensor in planned) / sum(tensor.weights for tensor in planned)


def _block_of(name: str, model: BlockModel) -> str:
    return name.removeprefix(model.architecture.blocks + ".").split(".")[0]


def _linear(block: nn.Module, name: str) -> nn.Linear:
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


@contextmanager
def _moments_of(
    block: nn.Module, groups: list[tuple[str, ...]], new: Callable[[int], SecondMoments]
) -> Iterator[dict[tuple[str, ...], SecondMoments]]:
    """While open, whatever enters a group's first linear is added to the group's second moments."""
    moments: dict[tuple[str, ...], SecondMoments] = {}
    handles = []
    for group in groups:
        linear = _linear(block, group[0])
        moments[group] = new(linear.in_features)

        def add(_: nn.Module, arguments: tuple[Tensor, ...], total: SecondMoments = moments[group]) -> None:
            total.add(arguments[0])

        handles.append(linear.register_forward_pre_hook(add))
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
