"""For torchrun: quantizes by every recipe of a JSON file in one group of processes, so that packages are imported once.

The file holds a list of [recipe's options, output folder].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import distributed

from lqexport.pipeline import quantize
from lqexport.recipe import Recipe

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    for options, out in json.loads(Path(sys.argv[1]).read_text()):
        quantize(Recipe(**options), Path(out), device="cpu")
    distributed.destroy_process_group()
