"""The reference models have the same weights everywhere. Every number in docs/ is measured on them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

DIGESTS = {
    "smollm2": "8d881c839b88baa6406629b981bb2d34fc177b404098148aa8f35c29a086f333",
    "smollm2-k": "c2c9ad0a9a8ad435a9ea3c6cf4d004e234cdd83f3e85b83edfec96c1af575397",
}
"""Model -> sha256 over the names and float16 bytes of all tensors, ordered by name; seed 1."""


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGESTS)
def test_weights_are_bitwise_those_of_the_published_figures(name: str, reference_models: Path) -> None:
    tensors = load_file(reference_models / name / "model.safetensors")
    hasher = hashlib.sha256()
    for tensor in sorted(tensors):
        hasher.update(tensor.encode() + tensors[tensor].tobytes())
    assert hasher.hexdigest() == DIGESTS[name]
