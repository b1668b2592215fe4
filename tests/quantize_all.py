"""Quantizes by every recipe of a JSON file in one process, or one group of processes under torchrun, so that packages
are imported once. With so little memory that everything is kept in files and worked on in the smallest parts.

The file holds a list of [recipe's options, output folder].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import distributed

from lqexport.memory import Budget
from lqexport.pipeline import quantize
from lqexport.recipe import Recipe

if __name__ == "__main__":
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    for options, out in json.loads(Path(sys.argv[1]).read_text()):
        quantize(Recipe(**options), Path(out), device="cpu", budget=Budget(host=1))
    if distributed.is_initialized():
        distributed.destroy_process_group()
