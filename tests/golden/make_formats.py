"""Prints tests/golden/formats.json: for every codec, bytes and the values that others decode from them.

    python tests/golden/make_formats.py > tests/golden/formats.json

GGUF values come from libgguf and, where it leaves a type out, from NumPy's own dtypes; native values from the slow
reading of the format's description below. No value comes from lqexport. Running it again must not change the file.
"""

from __future__ import annotations

import json
import sys

import gguf
import libgguf
import numpy as np

BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
SMALL_FLOATS = ["MXFP4"]
QUANTIZED = ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "Q1_0", "NVFP4", "IQ1_M"]
SUPERS = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)} | dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
SUPERS |= {"TQ1_0": (52,), "TQ2_0": (64,), "NVFP4": (), "IQ1_M": ()}
"""Byte offsets of the float16 numbers in a block; elsewhere at 0."""


def floats(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """float16 of both signs, of the size of real scales."""
    return (rng.standard_normal(shape) / 64).astype("<f2")


def block_type(name: str, rng: np.random.Generator) -> dict:
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
    for at in SUPERS.get(name, (0,)):
        blocks[:, at : at + 2] = floats(rng, (2, 1)).view(np.uint8)
    if name == "IQ1_M":
        scatter(blocks, floats(rng, (2, 1)))
    if name in QUANTIZED:  # one block is as its quantizer makes it
        quantized = libgguf.quantize_rows(
            rng.standard_normal((1, weights), np.float32) / 64, gguf.GGMLQuantizationType[name],
            imatrix=np.ones(weights, np.float32) if name[:3] in ("IQ1", "IQ2") else None,
        )  # fmt: skip
        blocks[1] = np.ascontiguousarray(quantized).view(np.uint8).ravel()
    return entry(weights, {"blocks": blocks}, libgguf.dequantize_rows(blocks, gguf.GGMLQuantizationType[name]))


def scatter(blocks: np.ndarray, halves: np.ndarray) -> None:
    """Writes float16 [2, 1] into the highest four bits of the last four words of IQ1_M's blocks, lowest bits first."""
    fourths = halves.view("<u2") >> np.array([0, 4, 8, 12], "<u2") & 15
    blocks[:, 49::2] = blocks[:, 49::2] & 15 | (fourths << 4).astype(np.uint8)


def small_floats(name: str, rng: np.random.Generator) -> dict:
    """A type whose blocks begin with exponents or small floating-point scales, one byte each."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    blocks = rng.integers(0, 256, (2, size), dtype=np.uint8)
    blocks[:, 0] = (1, 120)  # 2^-127, which is subnormal, and 2^-8
    return entry(weights, {"blocks": blocks}, libgguf.dequantize_rows(blocks, gguf.GGMLQuantizationType[name]))


def plain(name: str, rng: np.random.Generator) -> dict:
    wide = rng.standard_normal((2, 5)).astype("<f4")
    if name == "F32":
        return entry(5, {"blocks": wide.view(np.uint8)}, wide)
    if name == "F16":
        return entry(5, {"blocks": wide.astype("<f2").view(np.uint8)}, wide.astype("<f2"))
    halves = wide.view("<u2")[:, 1::2]  # the upper half of each number
    wide.view("<u2")[:, ::2] = 0
    return entry(5, {"blocks": np.ascontiguousarray(halves).view(np.uint8)}, wide)


def codes_of(stream: np.ndarray, bits: int, columns: int) -> list[int]:
    """One row's codes: code j is bits B*j .. B*j + B-1 of the row, taken as one little-endian number."""
    number = int.from_bytes(stream.tobytes(), "little")
    return [number >> (bits * j) & (2**bits - 1) for j in range(columns)]


def table(bits: int, rng: np.random.Generator) -> dict:
    columns = 21
    stream = rng.integers(0, 256, (2, (columns * bits + 7) // 8), dtype=np.uint8)
    tables = np.sort(floats(rng, (2, 2**bits)), axis=1)
    values = [[row[code] for code in codes_of(line, bits, columns)] for row, line in zip(tables, stream, strict=True)]
    return entry(columns, {"codes": stream, "table": tables}, np.array(values))


def affine(bits: int, group: int, rng: np.random.Generator) -> dict:
    columns = 2 * group or 21
    group = group or columns
    stream = rng.integers(0, 256, (2, (columns * bits + 7) // 8), dtype=np.uint8)
    scale, offset = floats(rng, (2, columns // group)), floats(rng, (2, columns // group))
    values = np.empty((2, columns), dtype=np.float32)
    for row in range(2):
        for j, code in enumerate(codes_of(stream[row], bits, columns)):
            product = np.float32(scale[row, j // group]) * np.float32(code)
            values[row, j] = product + np.float32(offset[row, j // group])
    return entry(columns, {"codes": stream, "scale": scale, "offset": offset}, values)


def mxint(bits: int, group: int, rng: np.random.Generator) -> dict:
    columns, largest = 2 * group, 2 ** (bits - 1) - 1
    integers = rng.integers(-largest, largest, (2, columns), endpoint=True)
    exponents = rng.integers(-10, 10, (2, 2))
    rows = [sum(int(m + largest) << (bits * j) for j, m in enumerate(row)) for row in integers]
    stream = np.array([list(row.to_bytes(columns * bits // 8, "little")) for row in rows], dtype=np.uint8)
    values = integers * 2.0 ** (np.repeat(exponents, group, axis=1) - (bits - 1))
    return entry(columns, {"codes": stream, "exponents": (exponents + 127).astype(np.uint8)}, values)


def scaled(whole: np.float32, golden: dict) -> dict:
    """An entry whose values are multiplied by a further float32."""
    values = whole * np.frombuffer(bytes.fromhex(golden["float32"]), "<f4")
    blocks = {name: np.frombuffer(bytes.fromhex(content), dtype).reshape(shape)
              for name, (dtype, shape, content) in golden["planes"].items()}  # fmt: skip
    return entry(golden["columns"], blocks | {"whole": np.full((1, 1), whole, "<f4")}, values)


def entry(columns: int, planes: dict[str, np.ndarray], values: np.ndarray) -> dict:
    stored = {name: [plane.dtype.str, list(plane.shape), plane.tobytes().hex()] for name, plane in planes.items()}
    return {"columns": columns, "planes": stored, "float32": values.astype("<f4").tobytes().hex()}


def main() -> None:
    rng = np.random.default_rng(20)
    content = {f"gguf:{name}": plain(name, rng) for name in ("F32", "F16", "BF16")}
    content |= {f"gguf:{name}": block_type(name, rng) for name in BLOCK_TYPES}
    content |= {f"native:table-{bits}": table(bits, rng) for bits in (2, 3, 4)}
    for bits in (2, 3, 4, 5, 6, 8):
        for name, group in {"g32": 32, "g64": 64, "g128": 128, "row": 0}.items():
            content[f"native:affine-{bits}-{name}"] = affine(bits, group, rng)
    for bits in (2, 3, 4, 6, 8):
        content |= {f"native:mxint-{bits}-g{group}": mxint(bits, group, rng) for group in (16, 32)}
    plus_one = rng.standard_normal((2, 5)).astype("<f4")
    content["gguf-norm:F32"] = entry(5, {"blocks": plus_one.view(np.uint8)}, plus_one - np.float32(1))
    decay = -np.exp(rng.standard_normal((2, 5))).astype("<f4")
    content["gguf-decay:F32"] = entry(5, {"blocks": decay.view(np.uint8)}, np.log(-decay.astype("<f8")))
    content |= {f"gguf:{name}": small_floats(name, rng) for name in SMALL_FLOATS}
    content |= {f"gguf:{name}": block_type(name, rng) for name in QUANTIZED}
    whole = np.array([[0, 1, -1, 255, 256], [129279, 384, 7, 1 << 24, -(1 << 24)]], "<i4")
    content["gguf-whole:I32"] = entry(5, {"blocks": whole.view(np.uint8)}, whole.astype("<f4"))
    content["gguf-scaled:NVFP4"] = scaled(np.float32(1 / 3), content["gguf:NVFP4"])
    json.dump(content, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
