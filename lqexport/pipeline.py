"""`quantize`: from a source to a finished artifact.

Each linear is solved under the second moments of its inputs, packed and written; then the whole model is tuned end to
end. Inputs come from the full-precision blocks before (`prefix = "full"`: linears are independent of each other, see
`lqexport.collect`), or from the quantized ones, linears in the order in which data flows (`prefix = "quantized"`:
true-sequential, as GPTQ and LeanQuant). A finished linear is never solved again: a resumed run repeats the passes,
which give the same bits, and reads what is done.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lqexport.allocate import Allocation
from lqexport.artifact import Artifact, SolvedModel, StoredTensor, read_json, write_json
from lqexport.asymmetric import CrossMoments
from lqexport.blocks import BlockModel
from lqexport.budget import Measured, found, measure_linears, measure_outer, options, parse_size
from lqexport.calibration import Calibration, load_calibration
from lqexport.choose import chosen_mixes, measured_options
from lqexport.collect import (
    BlockMoments,
    Group,
    begin_with_first,
    by_weight,
    embed,
    final_states,
    forward_moments,
    guided_moments,
    input_magnitudes,
    input_of,
    linear_of,
    run_through,
)
from lqexport.converters.architectures import architecture_of
from lqexport.converters.exl2_plan import keeps_order, plan_exl2
from lqexport.converters.factors import planned_factors
from lqexport.converters.plan import PlannedTensor
from lqexport.converters.targets import plan
from lqexport.converters.tensor_names import is_tied
from lqexport.corrected import solve_corrected, stored_correction, values_of
from lqexport.environment import choose_device, steady_threads, versions
from lqexport.errors import UserError
from lqexport.formats.codec import PlainCodec
from lqexport.formats.registry import codec
from lqexport.linear import round_tensor, solve_linear
from lqexport.moments import SecondMoments
from lqexport.moments_cache import MomentsCache
from lqexport.progress import Listener, Silent
from lqexport.ranks import at_ranks, share, summary
from lqexport.recipe import Recipe
from lqexport.source import Source, open_source
from lqexport.tune import HELD_OUT, Outcome, Tuner


def plan_recipe(source: Source, recipe: Recipe, chosen: dict[str, str] | None = None) -> list[PlannedTensor]:
    """What every tensor of the source will be stored as; `chosen` are codecs found for a size."""
    shapes = {name: source.shape(name) for name in source.names()}
    if recipe.bits is not None:
        return plan_exl2(source.config, shapes, bits=recipe.bits, head_bits=recipe.head_bits, fallback=recipe.fallback)
    types = (chosen or {}) | recipe.chosen_types()
    return plan(recipe.target, source.config, shapes, embedding_type=recipe.embedding_type,
                output_type=recipe.output_type, types=types, fallback=recipe.fallback)  # fmt: skip


def plan_factors(planned: list[PlannedTensor], recipe: Recipe) -> list[PlannedTensor]:
    """The factors that a run of `recipe` stores beside its linears."""
    return planned_factors(planned, recipe.rank, recipe.factors) if recipe.rank and not recipe.merge else []


def quantize(
    recipe: Recipe, out: Path, *, device: str = "auto", cache: Path | None = None, listener: Listener | None = None
) -> dict[str, Any]:
    """Quantize `recipe.source` into the artifact folder `out`, or finish what an interrupted run began there.

    cache   a folder that keeps second moments for other runs over the same source and calibration

    Returns the report that is also written to report.json. Raises UserError for bad input.
    """
    steady_threads()
    run = _Run(recipe, out, choose_device(device), cache, listener or Silent())
    if not run.artifact.complete:
        with torch.no_grad():
            run.choose_types()
            run.choose_mixes()
            run.round_others()
            run.solve_linears()
            run.share_ranks()
            run.tune()
        run.finish()
    return run.artifact.report()


class _Run:
    """The state of one call of `quantize`."""

    def __init__(self, recipe: Recipe, out: Path, device: torch.device, cache: Path | None, listener: Listener) -> None:
        self.recipe, self.device, self.listener = recipe, device, listener
        self.source = open_source(recipe.source)
        self.architecture = architecture_of(self.source.config)
        self._take_plan(plan_recipe(self.source, recipe))
        self.factors = plan_factors(self.planned, recipe)
        self._check_output_groups()
        self.calibration = self._calibration()
        self.artifact = Artifact(out)
        self.artifact.begin(self._identity())
        self.source.copy_model_files(self.artifact.model_folder)
        self.work = out / "work"
        # Choosing types needs all moments before solving does, so they are kept.
        cache = cache or (self.work / "moments" if recipe.size or recipe.bits else None)
        self.cache = MomentsCache(cache, self._moments_facts()) if cache and self.calibration else None
        self.outcome: Outcome | None = None
        self.budget: dict[str, Any] | None = None
        self.magnitudes: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        self.allocation: Allocation | None = None

    def _take_plan(self, planned: list[PlannedTensor]) -> None:
        """linears   what the solver works on in the decoder blocks;  head   the output, where it works on that"""
        self.planned = planned
        solved = {tensor.name: tensor for tensor in planned if tensor.linear}
        self.head = solved.pop(self.architecture.output, None)
        self.linears = solved

    def _check_output_groups(self) -> None:
        groups = self.recipe.output_groups
        for tensor in self.linears.values():
            if tensor.shape[0] % groups:
                raise UserError(
                    f"{tensor.name} has {tensor.shape[0]} outputs, which {groups} output groups do not divide."
                )

    def _calibration(self) -> Calibration | None:
        """None where nothing is solved: rounding needs no calibration, and plain types have no grid. A correction
        needs it whatever the method."""
        solved = any(not isinstance(codec(tensor.codec), PlainCodec) for tensor in self.linears.values())
        if (self.recipe.method == "rtn" and not self.recipe.rank) or not solved:
            return None
        recipe = self.recipe
        needed = max(recipe.samples, recipe.tuned_sequences + HELD_OUT) if recipe.tuned_sequences else recipe.samples
        calibration = load_calibration(recipe.calibration, self.source.tokenizer(), samples=needed,
                                       sequence_length=recipe.sequence_length, seed=recipe.seed)  # fmt: skip
        if calibration.repeats:
            self.listener.message(f"The text {recipe.calibration} is too short for {needed} different sequences.")
        return calibration

    @property
    def sequences(self) -> Tensor:
        """Token ids [samples, length] that second moments come from."""
        assert self.calibration is not None
        return self.calibration.tokens[: self.recipe.samples]

    def _identity(self) -> dict[str, Any]:
        return {
            "versions": versions("lqexport", "torch", "transformers", "numpy", "numba"),
            "recipe": asdict(self.recipe),
            "source_fingerprint": self.source.fingerprint,
            "device": self.device.type,
            "calibration": self.calibration.facts() if self.calibration else None,
        }

    def _moments_facts(self) -> dict[str, Any]:
        """What second moments depend on."""
        assert self.calibration is not None
        recipe = self.recipe
        keys = ("samples", "sequence_length", "seed", "moments", "output_groups")
        return {
            "versions": versions("lqexport", "torch", "transformers"),
            "source_fingerprint": self.source.fingerprint,
            "device": self.device.type,
            "calibration": {key: self.calibration.facts()[key] for key in ("sha256", "bos")},
            "recipe": {key: getattr(recipe, key) for key in keys},
        }

    def choose_types(self) -> None:
        """Where the recipe gives a size: measure every tensor in every type, and plan anew with the best choice."""
        if self.recipe.size is None:
            return
        path = self.artifact.folder / "budget.json"
        if not path.is_file():
            write_json(path, self._budget(self.recipe.size))
        self.budget = read_json(path, f"{path} is gone.")
        self._take_plan(plan_recipe(self.source, self.recipe, self.budget["chosen"]))

    def _budget(self, wanted: str) -> dict[str, Any]:
        """The choice of types, as budget.json keeps it."""

        def bytes_of(target: str) -> int:
            same = replace(self.recipe, target=target, size=None, types=[])
            return sum(tensor.nbytes for tensor in plan_recipe(self.source, same))

        weights = sum(tensor.weights for tensor in self.planned)
        limit = parse_size(wanted, weights, bytes_of)
        free = {tensor.name: options(tensor) for tensor in self.planned if not self._has_fixed_type(tensor)}
        measured = Measured(self.work / "measured.json")
        linears = {name: kinds for name, kinds in free.items() if name in self.linears and name not in measured.losses}
        if linears:
            model = BlockModel(self.source, self.device)
            begin = partial(self.listener.stage, "Measuring types", len(linears))
            moments = begin_with_first(self._moments(model), begin)
            measure_linears(self.source, model, moments, linears, self.recipe, measured, self.listener)
        outer = {name: kinds for name, kinds in free.items() if name not in measured.losses}
        self.listener.stage("Measuring embedding and output", len(outer))
        measure_outer(self.source, outer, self.sequences, self.device, measured, self.listener)
        return found(self.planned, measured.losses, limit)

    def _has_fixed_type(self, tensor: PlannedTensor) -> bool:
        by_hand = any(fnmatchcase(tensor.name, pattern) for pattern in self.recipe.chosen_types())
        return by_hand or len(options(tensor)) == 1

    def choose_mixes(self) -> None:
        """EXL2: measure what each mix of widths costs each linear, then plan those that cost least within the size."""
        if self.recipe.bits is None or self.calibration is None:
            return
        self._measure_mixes()
        blocks = range(self.source.config["num_hidden_layers"])
        options = {name: tried for index in blocks for name, tried in self.artifact.options(index).items()}
        shapes = {name: tensor.matrix for name, tensor in self.linears.items()}
        self.allocation = chosen_mixes(options, shapes, self.recipe.bits)
        chosen = {name: option.name for name, option in self.allocation.chosen.items()}
        self._take_plan([replace(tensor, codec=chosen.get(tensor.name, tensor.codec)) for tensor in self.planned])

    def _measure_mixes(self) -> None:
        """Store the options of every block's linears; those that an interrupted run stored stay."""
        model = BlockModel(self.source, self.device)
        missing = {index for index in range(len(model)) if not self.artifact.options(index)}
        if not missing:
            return
        begin = partial(self.listener.stage, "Measuring mixes of widths", len(missing))
        for block in begin_with_first(self._moments(model), begin):
            if block[0] not in missing:
                continue
            found = {}
            for name, hessian in by_weight(model, block).items():
                weight = self.source.read(name).to(self.device).float()
                found[name] = measured_options(weight, hessian.to(self.device), self._recipe_of(name))
            self.artifact.write_options(block[0], found)
            self.listener.advance(1)

    def _recipe_of(self, name: str) -> Recipe:
        """The recipe for one linear."""
        if self.recipe.bits is not None and keeps_order(self.architecture, self.source.config, name):
            return replace(self.recipe, act_order=False)
        if name == self.architecture.output:
            return replace(self.recipe, descent=0)  # many rows, and so wide that little is left to gain
        return self.recipe

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
        unfinished = [name for name in self.linears if name not in self.artifact]
        if self.calibration is None:
            self._begin_solving()
            for name in unfinished:
                self._solve(self.linears[name], self.source.read(name), None)
        elif unfinished:
            model = BlockModel(self.source, self.device)
            if self.recipe.rank and self.recipe.scaling == "l2qer":
                self.magnitudes = input_magnitudes(model, embed(model, self.sequences))
            step = self._solve_on_quantized if self.recipe.prefix == "quantized" else self._solve_on_full
            step(model)
        if self.head and self.head.name not in self.artifact:
            self._solve_head(self.head)

    def _solve_head(self, head: PlannedTensor) -> None:
        """The output, on inputs from the full-precision model."""
        own = head.name in self.source.names() and not is_tied(self.source.config)
        weight = self.source.read(head.name if own else self.architecture.embedding)
        if self.calibration is None:
            self._solve(head, weight, None)
            return
        model, kind = BlockModel(self.source, self.device), self.recipe.moments
        moments = SecondMoments(head.matrix[1], "normalized" if kind == "guided" else kind, self.device)
        for state in final_states(model, self.sequences):
            moments.add(model.normed(state.to(self.device)))
        self._solve(head, weight, moments.hessian())

    def _begin_solving(self) -> None:
        weights = {name: tensor.weights for name, tensor in self.linears.items()}
        self.listener.stage("Quantizing", sum(weights.values()))
        self.listener.advance(sum(weights[name] for name in weights if name in self.artifact))

    def _solve_on_full(self, model: BlockModel) -> None:
        """Every linear on inputs from the full-precision blocks before."""
        for block in begin_with_first(self._moments(model), self._begin_solving):
            for name, hessian in by_weight(model, block).items():
                if self._is_unfinished(name):
                    self._solve(self.linears[name], self.source.read(name), hessian.to(self.device))

    def _moments(self, model: BlockModel) -> Iterator[BlockMoments]:
        """Second moments of at least the unfinished linears; from the cache where it has them."""
        if self.cache is None:
            return self._collect(model, lambda index, group: bool(self._unfinished(model, index, group)))
        if all(index in self.cache for index in range(len(model))):
            return (self.cache.read(index, self.device) for index in range(len(model)))
        return self.cache.fill(self._collect(model, lambda *_: True))

    def _collect(self, model: BlockModel, wanted: Callable[[int, Group], bool]) -> Iterator[BlockMoments]:
        recipe = self.recipe
        if recipe.moments == "guided":
            return guided_moments(model, self.sequences, recipe.output_groups, self.work / "guided", self.listener)
        groups = model.architecture.linears
        last = max(index for index in range(len(model)) for group in groups if wanted(index, group))
        return forward_moments(model, embed(model, self.sequences), recipe.moments, wanted, last)

    def _unfinished(self, model: BlockModel, index: int, group: Group) -> list[str]:
        """Names of a group's linears that are still to be solved."""
        return [name for linear in group if self._is_unfinished(name := model.weight_name(index, linear))]

    def _is_unfinished(self, name: str) -> bool:
        # A shape that no grid holds is stored already, as F16, and is no linear of the plan.
        return name in self.linears and name not in self.artifact

    def _solve_on_quantized(self, model: BlockModel) -> None:
        """Block by block on inputs from the quantized blocks before; within a block, group by group."""
        self._begin_solving()
        inputs = embed(model, self.sequences)
        full = list(inputs) if self.recipe.asymmetric else None
        last = max(i for i in range(len(model)) for g in model.architecture.linears if self._unfinished(model, i, g))
        for index, block in model.blocks():
            if index > last:
                return
            original = model.block(index) if full else None
            for group in model.architecture.linears:
                if names := self._unfinished(model, index, group):
                    moments = self._group_moments(model, block, group, inputs, original, full)
                    for name in names:
                        self._solve_on(name, moments)
                for linear in group:
                    self._carry_forward(linear_of(block, linear), model.weight_name(index, linear))
            run_through(model, block, inputs)
            if original and full:
                run_through(model, original, full)

    def _group_moments(
        self, model: BlockModel, block: nn.Module, group: Group, inputs: list[Tensor],
        original: nn.Module | None, full: list[Tensor] | None,
    ) -> SecondMoments | CrossMoments:  # fmt: skip
        """Second moments of a group's inputs; with the full-precision block and its inputs, cross moments."""
        columns = linear_of(block, group[0]).in_features
        if original is None or full is None:
            moments = SecondMoments(columns, self.recipe.moments, self.device)
            for batch in inputs:
                moments.add(input_of(model, block, group[0], batch))
            return moments
        cross = CrossMoments(columns, self.recipe.moments, self.device)
        for i, (batch, exact) in enumerate(zip(inputs, full, strict=True)):
            cross.add(i % 2, input_of(model, original, group[0], exact), input_of(model, block, group[0], batch))
        return cross

    def _solve_on(self, name: str, moments: SecondMoments | CrossMoments) -> None:
        weight, tensor = self.source.read(name), self.linears[name]
        if isinstance(moments, CrossMoments):
            target, strength = moments.target(weight.to(self.device).float(), self.recipe.dampening)
            self._solve(tensor, target, moments.hessian(), {"asymmetric_strength": strength})
        else:
            self._solve(tensor, weight, moments.hessian())

    def _solve(
        self, tensor: PlannedTensor, weight: Tensor, hessian: Tensor | None, facts: dict[str, Any] | None = None
    ) -> None:
        name, began = tensor.name, time.perf_counter()
        *factors, solved = self._solved(name, weight.to(self.device).float(), hessian, tensor.codec)
        solved.facts.update(facts or {})
        for stored in (*factors, solved):  # the linear comes last: where it is, its factors are
            self.artifact.write(stored)
        self.artifact.log({"name": name, "seconds": round(time.perf_counter() - began, 3), **solved.facts})
        self.listener.advance(tensor.weights)

    def _solved(self, name: str, weight: Tensor, hessian: Tensor | None, kind: str) -> list[StoredTensor]:
        if hessian is None or not self.recipe.rank:
            return [solve_linear(name, weight, hessian, kind, self._recipe_of(name))]
        return solve_corrected(name, weight, hessian, self.magnitudes.get(name), kind, self.recipe)

    def _carry_forward(self, linear: nn.Linear, name: str) -> None:
        """Go on with the weights as the file decodes them."""
        values, correction = values_of(self.artifact.read(name)), stored_correction(self.artifact, name)
        linear.weight.data = (values if correction is None else values + correction).to(linear.weight)

    def share_ranks(self) -> None:
        """Settle the ranks of the corrections."""
        if self.recipe.rank:
            self.ranks = share(self.artifact, list(self.linears.values()), self.recipe)

    def tune(self) -> None:
        """Tune the solved model end to end, where the recipe says so."""
        if self.calibration is None or not self.recipe.tuned_sequences:
            return
        solved = SolvedModel(self.artifact, self.source.config, [tensor.name for tensor in self.planned])
        models = BlockModel(solved, self.device), BlockModel(self.source, self.device)
        tokens = torch.cat(
            [self.calibration.tokens[: self.recipe.tuned_sequences], self.calibration.tokens[-HELD_OUT:]]
        )
        tuner = Tuner(self.artifact, *models, tokens, self.recipe.tune_rate, self.work, self.listener)
        self.outcome = tuner.run()
        if not self.outcome.kept:
            self.listener.message("Tuning did not help on the held-out sequences: the model stays as it was solved.")

    def finish(self) -> None:
        factors = at_ranks(self.factors, self.ranks)
        tensors = [self._entry(tensor) for tensor in self.planned]
        report = {
            "run": self._identity(),
            "tensors": tensors,
            "bits_per_weight": _bits_per_weight(self.planned, factors),
        }
        if self.ranks:
            report["correction"] = summary(tensors, self.planned, factors, self.recipe.merge)
        if self.outcome:
            report["tuning"] = self.outcome.facts()
        if self.budget:
            report["budget"] = self.budget
        if self.recipe.bits is not None:
            report["linears_bits_per_weight"] = _bits_per_weight(list(self.linears.values()), [])
        if self.allocation:
            report["allocation"] = {"predicted": self.allocation.loss, "gap": self.allocation.gap}
        self.artifact.finish([tensor.name for tensor in (*self.planned, *factors)], report)
        shutil.rmtree(self.work, ignore_errors=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.artifact.log({"finished": True, "peak_memory_gib": round(peak, 3)})

    def _entry(self, tensor: PlannedTensor) -> dict[str, Any]:
        """A tensor in the report."""
        entry: dict[str, Any] = {"name": tensor.name, "codec": tensor.codec, "shape": list(tensor.shape)}
        entry["bytes"] = tensor.nbytes
        if tensor.reason:
            entry |= {"wanted": tensor.wanted, "reason": tensor.reason}
        if self.allocation and tensor.name in self.allocation.chosen:
            entry["predicted"] = self.allocation.chosen[tensor.name].loss
        entry |= self.artifact.facts(tensor.name)
        if tensor.name in self.ranks:
            entry["correction"]["rank"] = self.ranks[tensor.name]
        return entry


def _bits_per_weight(planned: list[PlannedTensor], factors: list[PlannedTensor]) -> float:
    """Bytes of factors count, their numbers do not: they add nothing to the model's weights."""
    return 8 * sum(tensor.nbytes for tensor in (*planned, *factors)) / sum(tensor.weights for tensor in planned)
