"""Continues a prompt with a model of the native format. Its weights stay packed in memory.

python examples/generate.py ./SmolLM2-135M-3bit "The capital of France is"
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

import lqexport


def run(folder: str | Path, prompt: str, tokens: int = 32) -> str:
    """Returns the prompt with up to `tokens` more tokens."""
    model, tokenizer = lqexport.load(folder, device_map="auto"), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0])


if __name__ == "__main__":
    print(run(sys.argv[1], sys.argv[2]))
