"""Runs one lqexport command and prints its peak memory.

    python bench/peak.py LIMIT quantize ...

LIMIT is the most bytes of data that the command may allocate, as with `ulimit -d`: heap, stacks and all private
writable mappings. 0 means no limit. `ulimit -v` would count the libraries too, and those of a CUDA build of torch take
GBs. The last line of standard output is JSON: the peak resident bytes, and for a GPU the peak bytes that torch had
allocated and reserved.
"""

from __future__ import annotations

import json
import resource
import sys


def main() -> None:
    if limit := int(sys.argv[1]):  # before torch is loaded, since loading it takes memory too
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
