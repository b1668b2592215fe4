"""Measures whether it is faster to solve several experts at once than one after the other with all threads.

    python bench/expert_threads.py [--threads 2] [--experts 4] [--hidden 2048] [--width 768] [--target gguf:Q4_K]

lqexport solves experts one after the other, and divides the rows of each between all threads. This script solves
up_proj and down_proj of random experts in three ways: in one thread; one after the other, each in all threads; and as
many at once as there are threads, each in one thread. Each way runs in its own process. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

WAYS = {"in one thread": (False, False), "rows in all threads": (True, False), "experts at once": (False, True)}
"""For each way: whether torch and numba have all threads, and whether that many linears are solved at once."""


def seconds(given: argparse.Namespace, at_once: int) -> float:
    """Solves all linears in this process, `at_once` at a time. Returns the seconds."""
    import numba
    import torch
    from solver_cost import problem

    from lqexport.recipe import Recipe
    from lqexport.runtime.environment import steady_threads
    from lqexport.solver.linear import solve_linear

    steady_threads()
    problems = [problem(given.width, given.hidden), problem(given.hidden, given.width)] * given.experts

    def begin() -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        numba.set_num_threads(int(os.environ["NUMBA_NUM_THREADS"]))

    def solve(index: int) -> None:
        solve_linear("any", *problems[index], given.target, Recipe("none", given.target).solver_settings)

    solve(0)  # compiles
    with ThreadPoolExecutor(at_once, initializer=begin) as pool:
        began = time.perf_counter()
        list(pool.map(solve, range(len(problems))))
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("experts", 4), ("hidden", 2048), ("width", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--target", default="gguf:Q4_K")
    parser.add_argument("--at-once", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.at_once:
        print(seconds(given, given.at_once))
        return
    print("| | seconds |\n|---|---|")
    for name, (threads, together) in WAYS.items():
        count = str(given.threads if threads else 1)
        command = [sys.executable, *sys.argv, "--at-once", str(given.threads if together else 1)]
        environment = os.environ | {"OMP_NUM_THREADS": count, "NUMBA_NUM_THREADS": count}
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        print(f"| {name} | {float(printed):.2f} |", flush=True)


if __name__ == "__main__":
    main()
