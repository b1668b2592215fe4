"""One command of lqexport, and what memory it took at its peak.

    python bench/peak.py LIMIT quantize ...

LIMIT: the most bytes that it may ask for, as by `ulimit -d`: heap, stacks and whatever else is mapped to be written and
not shared; 0 for any. Not as by `ulimit -v`, which counts the libraries too: those of a CUDA build of torch take GBs.
The last line of standard output is JSON: peak resident bytes, and of a GPU those that torch had given out and held.
"""

from __future__ import annotations

import json
import resource
import sys


def main() -> None:
    if limit := int(sys.argv[1]):  # before torch is loaded, which needs some itself
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    from lqexport.cli.app import app
    from lqexport.runtime.environment import peak_memory

    status = app(sys.argv[2:], standalone_mode=False)
    peaks = {"peak_bytes": peak_memory()}
    if torch.cuda.is_initialized():
        peaks["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        peaks["device_reserved_bytes"] = torch.cuda.max_memory_reserved()
    print(json.dumps(peaks))
    sys.exit(status)


if __name__ == "__main__":
    main()
