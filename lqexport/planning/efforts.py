"""Estimates the time of a run at each effort, so that they can be shown beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from lqexport.planning.compute_dtype import with_compute_dtype
from lqexport.planning.cost import Rates, Work, seconds_estimate
from lqexport.recipe import ComputeDtype, Effort, Recipe
from lqexport.runtime.placement import Placement


def seconds_by_effort(
    work: Work, efforts: Mapping[Effort, Recipe], placement: Placement, threads: int,
    rates_in: Callable[[ComputeDtype], Rates],
) -> dict[Effort, float]:  # fmt: skip
    """Returns the estimated seconds of a run at each effort.

    efforts    the settled recipe of each effort
    threads    CPU threads that fit grids and unpack weights
    rates_in   returns the rates of matrix products where the passes multiply in a dtype
    """
    seconds: dict[Effort, float] = {}
    for effort, recipe in efforts.items():
        each, device_type = replace(work, recipe=recipe), placement.device.type
        chosen, _ = with_compute_dtype(each, device_type, None)
        rates = rates_in(chosen.compute_dtype_on(device_type))
        seconds[effort] = seconds_estimate(each, rates, threads, placement.parts, placement.held)
    return seconds


def effort_sentence(times: Mapping[Effort, float], unit: str) -> str:
    """Returns one line with the time of a run at each effort, in a unit whose name in the plural is given."""
    return f"By effort: {', '.join(f'{effort} {time:.1f}' for effort, time in times.items())} {unit}"
