"""Second moments and token weights for the stages of a run: collected once, and kept where a later stage needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from lqexport.calibration.block_collector import BlockMoments
from lqexport.calibration.collect import by_weight, forward_moments
from lqexport.calibration.guided import guided_moments, guided_pass
from lqexport.calibration.moments import Group, TokenWeights
from lqexport.models.blocks import BlockModel
from lqexport.pipeline.job import Job


def block_moments(job: Job, model: BlockModel) -> Iterator[BlockMoments]:
    """Yields the second moments of the blocks that have unfinished linears; from the cache if it has all blocks.

    Each of several processes gets other blocks.
    """
    cache = job.moments_cache
    if cache is None:
        return _collected(job, model, lambda block, group: bool(job.unfinished(model, block, group)))
    blocks = range(len(model))
    if job.processes.from_first(all(block in cache for block in blocks)):
        return (cache.read(block) for block in job.processes.share_of(blocks))
    return cache.fill(_collected(job, model, lambda *_: True))


def _collected(job: Job, model: BlockModel, wanted: Callable[[int, Group], bool]) -> Iterator[BlockMoments]:
    recipe, keep, parts = job.recipe, job.placement.moments.keep, job.placement.parts
    if recipe.moments == "guided":
        # Asymmetric calibration later takes its weights of the tokens from the same guided pass.
        keep_weights = job.token_weights_cache.write if recipe.asymmetric and job.token_weights_cache else None
        return guided_moments(
            model, job.sequences, output_groups=recipe.output_groups, folder=job.guided_folder,
            listener=job.listener, processes=job.processes, keep=keep, held=_keeps_states_in_memory(job),
            power=recipe.guided_power, weights=keep_weights, parts=parts,
        )  # fmt: skip
    groups = model.architecture.linears_of
    last = max(block for block in range(len(model)) for group in groups(block) if wanted(block, group))
    return forward_moments(
        model, job.sequences, job.moments_type, wanted=wanted, last=last, processes=job.processes, keep=keep,
        parts=parts, keep_states=job.placement.hidden.keep,
    )  # fmt: skip


def token_weights(job: Job, model: BlockModel) -> dict[str, Tensor]:
    """Returns each linear's guided weights of the tokens, float32 [tokens], by the name of its weight.

    They are kept beside the second moments, or until the run is done.
    """
    cache = job.token_weights_cache
    assert cache is not None
    if not job.processes.from_first(all(block in cache for block in range(len(model)))):
        collectors = [partial(TokenWeights, power=job.recipe.guided_power)]
        passed = guided_pass(
            model, job.sequences, collectors, folder=job.guided_folder, listener=job.listener,
            processes=job.processes, held=_keeps_states_in_memory(job),
        )  # fmt: skip
        for number, _ in enumerate(cache.fill(weights for (weights,) in passed)):
            if number == 0:  # the pass through the last block came right behind the forward pass
                job.listener.stage("Backward pass", math.ceil(len(model) / job.processes.count))
            job.listener.advance(1)
        job.processes.wait()
    blocks = (by_weight(model, cache.read(block)) for block in range(len(model)))
    return {name: weights for block in blocks for name, weights in block.items()}


def _keeps_states_in_memory(job: Job) -> bool:
    """Returns whether the guided pass keeps hidden states in memory; several processes share them in files."""
    return job.placement.states and job.processes.count == 1
