"""How a written model is run: commands for a terminal, and lines for a model card."""

from __future__ import annotations

import shlex
from pathlib import Path


def commands(name: str, family: str, adapter: Path | None = None) -> list[str]:
    """Returns the commands that run a model of a target family.

    name      its file or folder
    adapter   its low-rank corrections, if they lie beside it
    """
    path = shlex.quote(name)
    if family == "gguf":
        lora = f" --lora {shlex.quote(str(adapter))}" if adapter else ""
        return [f"llama-cli -m {path}{lora}", f"llama-server -m {path}{lora}"]
    if family == "gptq":
        return [f"vllm serve {path}"]
    if family == "exl2":
        return [f"python -m exllamav2.test_inference -m {path} -p 'Hello'"]
    return [f"python examples/generate.py {path} 'Hello'"]
