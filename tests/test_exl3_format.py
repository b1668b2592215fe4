"""EXL3: layers that ExLlamaV3's kernels decoded, the laws of its codecs, and refused inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lqexport.formats.codec import Planes, bits_per_weight
from lqexport.formats.exl3 import EXL3, Exl3, signs
from lqexport.formats.registry import codec_named
from lqexport.formats.trellis import CODEBOOKS, Trellis, Walks, rotated

GOLDEN = Path(__file__).parent / "golden" / "exl3"
SHARED = Path(__file__).parent.parent.parent / "shared" / "vectors" / "exl3"
NAMES = ["k1_mul1", "k2_3inst_legacy_su_sv", "k2_mul1_nonsquare", "quantized_q_4_mul1"]
FURTHER = ["k4_mul1_bias", "k5_3inst", "k6_mul1", "k8_mul1"]

pytestmark = pytest.mark.filterwarnings("error")
every_codec = pytest.mark.parametrize("name", EXL3)
every_vector = pytest.mark.parametrize("name", NAMES + FURTHER)


def vector(name: str) -> tuple[Exl3, Planes, dict[str, np.ndarray]]:
    """Returns the codec and the planes of a layer, and what ExLlamaV3 made of it. Skips if it is not there."""
    folder = GOLDEN if name in NAMES else SHARED
    if not (folder / f"{name}.safetensors").is_file():
        pytest.skip("the vector is in ../shared only, which is not there")
    content = {key.rpartition(".")[2]: array for key, array in load_file(folder / f"{name}.safetensors").items()}
    for scale, bits in (("suh", "su"), ("svh", "sv")):
        if bits in content:
            content[scale] = signs(content[bits])
    codebook = next((marker for marker in ("mul1", "mcg") if marker in content), "3inst")
    codec = codec_named(f"exl3:{content['trellis'].shape[2] // 16}{'' if codebook == 'mul1' else f'-{codebook}'}")
    assert isinstance(codec, Exl3)
    return codec, {plane: content[plane] for plane in ("trellis", "suh", "svh")}, content


def random_case(name: str, rows: int = 130, columns: int = 128) -> tuple[Exl3, Walks]:
    draw = np.random.default_rng(0)
    codec = EXL3[name]
    rings = draw.integers(-(2**15), 2**15, codec.layout(rows, columns)["trellis"][1]).astype(np.int16)
    scales = [(draw.normal(size=size) * 0.02).astype(np.float16) for size in (columns, rows)]
    return codec, Walks(codec.trellis, codec.trellis.unpack(rings), *scales)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    theirs = theirs.astype(np.float32)
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


# Compared with ExLlamaV3.


@every_vector
def test_weights_are_those_of_exllamav3(name: str) -> None:
    codec, planes, content = vector(name)
    if "inner" in content:
        assert np.array_equal(codec.unpack(planes, len(planes["suh"])).codes(), content["inner"].astype(np.float32))
    decoded = codec.decode(planes, len(planes["suh"])).T
    assert relative(decoded, content["expected"]) < 6e-5  # sums in float32 have another order
    assert np.mean(decoded == content["expected"]) > 0.99


@every_vector
def test_products_are_those_of_exllamav3(name: str) -> None:
    """Its kernels round the rotated inputs and outputs to float16, and never form the weights."""
    codec, planes, content = vector(name)
    inputs, outputs = (planes[scale].astype(np.float32) for scale in ("suh", "svh"))
    mixed = half(rotated(np.ascontiguousarray(half(content["x"] * inputs).T)).T)
    sums = half(mixed @ codec.unpack(planes, len(inputs)).codes())
    products = half(half(rotated(np.ascontiguousarray(sums.T)).T) * outputs)
    if "bias" in content:
        products = half(products + content["bias"])
    assert relative(products, content["y"]) < 6e-4


@every_vector
def test_every_bit_of_a_vector_is_kept(name: str) -> None:
    codec, planes, _ = vector(name)
    again = codec.encode(codec.unpack(planes, len(planes["suh"])))
    assert all(np.array_equal(again[plane], array) for plane, array in planes.items())


def test_codebooks_are_as_described() -> None:
    """Their mean, standard deviation, range and count of values, from the description of the format."""
    facts = {"mul1": (-0.0019, 1.0003, 913), "mcg": (0.0, 1.2441, 10746), "3inst": (0.0002, 1.2437, 10598)}
    for codebook in CODEBOOKS:
        table = Trellis(4, codebook).table
        mean, deviation, distinct = facts[codebook]
        assert abs(table.mean() - mean) < 1e-4
        assert abs(table.std() - deviation) < 1e-4
        assert len(np.unique(table)) == distinct


# The laws.


@every_codec
def test_decoding_what_was_encoded_gives_the_values_bitwise(name: str) -> None:
    codec, walks = random_case(name)
    planes = codec.encode(walks)
    assert {plane: (array.dtype, array.shape) for plane, array in planes.items()} == codec.layout(130, 128)
    assert np.array_equal(codec.decode(planes, 128), walks.values())
    assert codec.decode(planes, 128).shape == (130, 128)
    assert np.array_equal(codec.unpack(planes, 128).states, walks.states)


@every_codec
def test_states_follow_from_one_another_around_the_ring(name: str) -> None:
    codec, walks = random_case(name)
    bits = codec.trellis.new_bits.astype(np.uint32)
    before = np.roll(walks.states, 1, axis=-1).astype(np.uint32)
    new = walks.states & ((1 << bits) - 1)
    assert np.array_equal(((before << bits) | new) & 0xFFFF, walks.states)
    assert bits.sum() == 256 * float(name[5:].partition("-")[0])


def test_the_padding_of_a_matrix_is_what_the_file_pads_it_with() -> None:
    codec, walks = random_case("exl3:3", rows=200, columns=100)
    planes = codec.encode(walks)
    as_stored = planes | {name: np.pad(planes[name], (0, size)) for name, size in (("suh", 28), ("svh", 56))}
    decoded = codec.decode(as_stored, 128)
    assert np.array_equal(decoded[:200, :100], walks.values())
    assert not decoded[200:].any()
    assert not decoded[:, 100:].any()


def test_the_hadamard_matrix_is_its_own_inverse() -> None:
    rows = rotated(np.eye(128, dtype=np.float32))
    assert np.allclose(np.abs(rows), 128**-0.5, rtol=1e-6)
    assert rows[3, 5] < 0 < rows[3, 4]
    assert np.allclose(rotated(rows), np.eye(128), atol=1e-6)


def test_the_bits_that_a_file_spends_on_a_weight() -> None:
    assert bits_per_weight(EXL3["exl3:2.5"], 1024, 2048) == 2.5 + 16 * (1024 + 2048) / (1024 * 2048)


# Refused.


def test_names_of_widths_that_do_not_exist_are_refused() -> None:
    for name in ("exl3:4.5", "exl3:9", "exl3:0.5", "exl3:2.5-mcg", "exl3:3-mul1", "exl3:"):
        with pytest.raises(ValueError, match="Unknown format"):
            codec_named(name)


@pytest.mark.parametrize(
    ("plane", "array", "message"),
    [
        ("trellis", np.zeros((8, 8, 32), np.int16), r"must be int16 \[8, 8, 48\]"),
        ("trellis", np.zeros((4, 8, 48), np.int16), r"must be int16 \[8, 8, 48\]"),
        ("suh", np.zeros(127, np.float16), r"must be float16 \[128\]"),
        ("svh", np.zeros(200, np.float16), r"must be int16 \[8, 16, 48\]"),
        ("svh", np.zeros(128, np.float32), "must be float16"),
        ("su", np.zeros(8, np.int16), "has the planes"),
    ],
)
def test_planes_that_are_wrong_are_refused(plane: str, array: np.ndarray, message: str) -> None:
    codec, walks = random_case("exl3:3", rows=128)
    with pytest.raises(ValueError, match=message):
        codec.decode(codec.encode(walks) | {plane: array}, 128)


def test_walks_that_the_file_cannot_hold_are_refused() -> None:
    codec, walks = random_case("exl3:3")
    broken = walks.states.copy()
    broken[0, 1, 7] ^= 0x8000
    wrong = [
        ("are no walks", {"states": broken}),
        ("another trellis", {"trellis": Trellis(4, "mul1")}),
        ("infinite or not a number", {"inputs": np.full(128, np.nan, np.float16)}),
        ("too large", {"outputs": np.full(130, 60000, np.float16)}),
    ]
    for message, change in wrong:
        with pytest.raises(ValueError, match=message):
            codec.encode(dataclasses.replace(walks, **change))
