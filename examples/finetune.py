"""Trains a LoRA adapter on a text, on top of packed weights, which do not change.

python examples/finetune.py ./SmolLM2-135M-3bit text.txt ./adapter
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import lqexport


def run(folder: str | Path, text: str, out: str | Path, steps: int = 50, length: int = 256) -> list[float]:
    """Trains on `steps` sequences of `length` tokens, writes the adapter to `out`, and returns every step's loss."""
    model, tokenizer = lqexport.load(folder, device_map="auto"), AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    losses = []
    for step in range(steps):
        start = step * length % max(1, len(ids) - length)
        batch = ids[None, start : start + length].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(out)
    return losses


if __name__ == "__main__":
    losses = run(sys.argv[1], Path(sys.argv[2]).read_text(), sys.argv[3])
    print(f"loss {losses[0]:.3f} before, {losses[-1]:.3f} after; wrote {sys.argv[3]}")
