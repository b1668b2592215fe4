"""Prints tests/golden/mlx.json: for every codec of MLX, bytes and the values that mlx.core.dequantize makes of them.

    python tests/golden/make_mlx.py > tests/golden/mlx.json

No value comes from lqexport. Running it again must not change the file.
"""

from __future__ import annotations

import json
import sys

import mlx.core as mx
import numpy as np


def affine(bits: int, group: int, dtype: mx.Dtype, rng: np.random.Generator) -> dict:
    """Two rows of two groups: numbers of the size of real ones in the first, of any size in the second."""
    columns = 2 * group
    packed = rng.integers(0, 2**32, (2, columns * bits // 32), dtype=np.uint32)
    sizes = np.array([[1 / 64], [4.0]], np.float32)
    scales, biases = (mx.array(sizes * rng.standard_normal((2, 2), np.float32)).astype(dtype) for _ in range(2))
    values = mx.dequantize(mx.array(packed), scales, biases, group_size=group, bits=bits)
    stored = np.uint16 if dtype == mx.bfloat16 else np.float16
    numbers = {name: np.array(of.view(mx.uint16)).view(stored) for name, of in (("scales", scales), ("biases", biases))}
    return entry(columns, {"weight": packed} | numbers, values)


def small_floats(mode: str, bits: int, group: int, rng: np.random.Generator) -> dict:
    """Codes of all numbers, with scales next to 1 in the first row and of any size in the second."""
    columns = 8 * group
    codes = rng.integers(0, 256, (2, columns * bits // 8), dtype=np.uint8)
    codes[codes % 128 == 127] = 0 if bits == 8 else 127  # not a number, of 8 bits
    near, wide = rng.integers(50, 60, 8), rng.integers(0, 254, 8)
    scales = np.stack([near + 65 * (group == 32), wide - (wide % 128 == 127)]).astype(np.uint8)
    values = mx.dequantize(mx.array(codes.view(np.uint32)), mx.array(scales), group_size=group, bits=bits, mode=mode)
    return entry(columns, {"weight": codes.view(np.uint32), "scales": scales}, values)


def entry(columns: int, planes: dict[str, np.ndarray], values: mx.array) -> dict:
    stored = {name: [plane.dtype.str, list(plane.shape), plane.tobytes().hex()] for name, plane in planes.items()}
    decoded = np.array(values.astype(mx.float32)).astype("<f4")
    return {"columns": columns, "planes": stored, "float32": decoded.tobytes().hex()}


def main() -> None:
    rng = np.random.default_rng(24)
    content = {}
    for suffix, dtype in {"": mx.bfloat16, "-f16": mx.float16}.items():
        for bits in (2, 3, 4, 5, 6, 8):
            content |= {f"mlx:{bits}-g{group}{suffix}": affine(bits, group, dtype, rng) for group in (32, 64, 128)}
    content["mlx:mxfp4"] = small_floats("mxfp4", 4, 32, rng)
    content["mlx:nvfp4"] = small_floats("nvfp4", 4, 16, rng)
    content["mlx:mxfp8"] = small_floats("mxfp8", 8, 32, rng)
    json.dump(content, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
