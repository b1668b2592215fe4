"""GGUF's i-quants, decoded as gguf-py and ggml do, and files of them made by llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from gguf import quants
from rewritten_files import Content, content_of, rewritten
from spoiled_files import gguf_file, save_sharp
from typer.testing import CliRunner

import lqexport
from lqexport.calibration.texts import read_text
from lqexport.cli.app import app
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.errors import UserError
from lqexport.evaluation import llamacpp_quantizer
from lqexport.formats.gguf_vectors import EVEN_SIGNS, GGUF_VECTORS, IQ1_M
from lqexport.formats.registry import codec_named
from lqexport.grids.rounding import USUAL_ERRORS, rounded_like
from lqexport.recipe import Recipe
from lqexport.target import Target, spelled, type_at_end
from lqexport.verification.verifying import verify

NAMES = [codec.name.removeprefix("gguf:") for codec in GGUF_VECTORS]
every_type = pytest.mark.parametrize("name", NAMES)
QUICK = ("IQ2_XXS", "IQ3_XXS", "IQ3_S")
"""Those that ggml needs few seconds to get ready for; golden vectors have blocks of all that it has quantized."""


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def halves(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Returns finite float16 of any bits."""
    values = rng.integers(0, 2**16, shape, dtype=np.uint16).view(np.float16)
    return np.where(np.isfinite(values), values, np.float16(-0.0))


def scatter(structs: np.ndarray, supers: np.ndarray) -> None:
    """Writes the float16 of each block into a block of IQ1_M."""
    fourths = supers.view(np.uint16)[..., None] >> np.array([0, 4, 8, 12], np.uint16) & 15
    structs["scales"] = structs["scales"] & 0x0FFF | fourths << 12


def random_blocks(name: str, seed: int) -> np.ndarray:
    """Returns random packed rows, uint8 [7, bytes of 3 blocks], whose float16 numbers are finite."""
    rng, codec = np.random.default_rng(seed), codec_named(f"gguf:{name}")
    blocks = rng.integers(0, 256, codec.layout(7, 3 * codec.block)["blocks"][1], dtype=np.uint8)
    structs = blocks.view(codec.members)
    if name == "IQ1_M":
        scatter(structs, halves(rng, structs.shape))
    else:
        structs["d"] = halves(rng, structs.shape)
    return blocks


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@every_type
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("error")
def test_random_blocks_decode_as_in_gguf_and_ggml_bitwise(name: str, seed: int) -> None:
    codec, blocks = codec_named(f"gguf:{name}"), random_blocks(name, seed)
    decoded = codec.decode({"blocks": blocks}, 3 * codec.block)
    assert same_bits(decoded, libgguf.dequantize_rows(blocks, ggml_type(name)))
    assert same_bits(decoded, quants.dequantize(blocks, ggml_type(name)))
    order = np.random.default_rng(seed).permutation(7)
    assert same_bits(codec.decode({"blocks": blocks[order]}, 3 * codec.block), decoded[order])


@every_type
def test_a_file_of_nans_decodes_to_nans_as_in_ggml(name: str) -> None:
    blocks = np.full((1, gguf.GGML_QUANT_SIZES[ggml_type(name)][1]), 0xFF, np.uint8)
    codec = codec_named(f"gguf:{name}")
    with np.errstate(invalid="ignore"):
        decoded = codec.decode({"blocks": blocks}, codec.block)
    assert np.array_equal(decoded, libgguf.dequantize_rows(blocks, ggml_type(name)), equal_nan=True)
    assert np.isnan(decoded).all()


@pytest.mark.parametrize("name", QUICK)
def test_what_ggml_quantizes_decodes_alike_and_has_the_usual_error(name: str) -> None:
    weights = np.random.default_rng(0).standard_normal((2, 512), np.float32)
    imatrix = np.ones(512, np.float32) if name == "IQ2_XXS" else None
    blocks = np.ascontiguousarray(libgguf.quantize_rows(weights, ggml_type(name), imatrix=imatrix)).reshape(2, -1)
    decoded = codec_named(f"gguf:{name}").decode({"blocks": blocks}, 512)
    assert same_bits(decoded, libgguf.dequantize_rows(blocks, ggml_type(name)))
    usual, error = USUAL_ERRORS[f"gguf:{name}"], np.square(decoded - weights).sum() / np.square(weights).sum()
    assert 0.5 * usual < error < usual


@every_type
def test_block_sizes_are_ggufs(name: str) -> None:
    codec = codec_named(f"gguf:{name}")
    assert (codec.block, codec.members.itemsize) == gguf.GGML_QUANT_SIZES[ggml_type(name)]


def test_the_signs_of_seven_bits_are_ggufs() -> None:
    assert EVEN_SIGNS.tolist() == list(quants.IQ2_XXS.ksigns)


# Their names.


@pytest.mark.parametrize("name", [*NAMES, "IQ2_M", "IQ3_XS", "IQ3_M"])
def test_the_name_of_a_file_says_them(name: str) -> None:
    assert str(Target.parse(name.lower().replace("_", ""))) == f"gguf:{name}"
    assert spelled(name) == name
    assert type_at_end(f"model-{name.lower()}") == name


# Files of llama.cpp's quantizer.


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharp(tmp_path_factory.mktemp("model") / "untied", "untied", tiny_model, 256)


@pytest.fixture(scope="module")
def llamacpps(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns a file in which llama.cpp has quantized every matrix to a type."""
    folder = tmp_path_factory.mktemp("files")
    plain = gguf_file(model, folder, "gguf:F16")
    widths = {name: data.shape[1] for name, data in content_of(plain).tensors.items() if data.ndim == 2}
    imatrix = {name: np.ones(width, np.float32) for name, width in widths.items()}

    def file(name: str) -> Path:
        if not (path := folder / f"model-{name}.gguf").exists():
            llamacpp_quantizer.quantize(plain, path, name, imatrix=imatrix, pure=True)
        return path

    return file


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text("python-heldout").content[:12_000], encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_XXS", "TQ2_0"])
@pytest.mark.parametrize("engine", ["lqexport", "llama.cpp"])
def test_a_file_of_llamacpp_passes(
    name: str, engine: str, llamacpps: Callable[[str], Path], model: Path, heldout: str
) -> None:
    """Its weights also run alike in both engines: llama.cpp's decoder and ours give the same loss."""
    path = llamacpps(name)
    assert {entry.type for entry in lqexport.inspect(str(path)).entries} == {"gguf:F32", f"gguf:{name}"}
    result = verify(path, str(model), text=heldout, windows=2, engine=engine, max_perplexity_ratio=None)
    (loss,) = result.expected
    assert (result.failed, result.causes) == ([], [])
    assert loss.measured == pytest.approx(loss.expected, rel=5e-3)


def exchanged(content: Content) -> None:
    """Exchanges two matrices of a block."""
    gate, up = (f"blk.1.ffn_{name}.weight" for name in ("gate", "up"))
    content.tensors[gate], content.tensors[up] = content.tensors[up], content.tensors[gate]


def scaled(content: Content) -> None:
    """Multiplies a matrix by 1.5."""
    members = np.dtype([("d", "<f2"), ("rest", "u1", 96)])
    data = content.tensors["blk.1.attn_output.weight"]
    data.view(members)["d"] *= np.float16(1.5)


@pytest.mark.parametrize("spoil", [exchanged, scaled])
def test_a_wrong_file_fails(
    spoil: Callable[[Content], None], llamacpps: Callable[[str], Path], model: Path, heldout: str, tmp_path: Path
) -> None:
    path = rewritten(llamacpps("IQ3_XXS"), tmp_path / "wrong.gguf", spoil)
    result = verify(path, str(model), text=heldout, windows=2, max_perplexity_ratio=None)
    assert result.failed
    assert any("layers.1." in sentence for sentence in (*result.failed, *result.causes))


def test_the_commands_take_such_files(
    llamacpps: Callable[[str], Path], model: Path, heldout: str, tmp_path: Path
) -> None:
    path, other = llamacpps("IQ3_XXS"), llamacpps("TQ2_0")
    run = CliRunner().invoke
    ended = run(app, ["check", str(path), str(other), "--json"])
    assert (ended.exit_code, [entry["engine"] for entry in json.loads(ended.stdout)["files"]]) == (0, ["loads"] * 2)
    compared = lqexport.compare([path, other], against=str(model), text=heldout, windows=1)
    assert [round(entry.bits_per_weight, 1) for entry in compared.files] == [3.1, 2.1]
    lqexport.quantize(Recipe(str(path), "Q8_0", method="rtn"), tmp_path / "out", device="cpu")
    result = verify(tmp_path / "out", str(path), text=heldout, windows=1)
    assert (result.failed, result.evaluations[0].kl < 0.01) == ([], True)


def test_infinite_scales_are_found(llamacpps: Callable[[str], Path], tmp_path: Path) -> None:
    """Infinite scales are found in IQ1_M, too, which spreads the bits of a scale over several places."""

    def spoil(content: Content) -> None:
        structs = np.zeros((512, 1), IQ1_M.members)
        scatter(structs[3:4], np.full((1, 1), np.inf, np.float16))
        content.tensors["blk.0.ffn_up.weight"] = structs.view(np.uint8)
        content.forms["blk.0.ffn_up.weight"] = ggml_type("IQ1_M")

    path = rewritten(llamacpps("TQ2_0"), tmp_path / "wrong.gguf", spoil)
    (checked,) = lqexport.check(path).files
    assert any("blk.0.ffn_up.weight (1)" in problem.sentence for problem in checked.errors)
    with pytest.raises(UserError, match="infinite or not a number"):
        GGUFModel(path).read("model.layers.0.mlp.up_proj.weight")


def test_weights_stand_for_rounded_ones_as_far_as_their_type_errs() -> None:
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    blocks = libgguf.quantize_rows(weight.numpy(), ggml_type("IQ3_S")).reshape(2, -1)
    stored = torch.from_numpy(codec_named("gguf:IQ3_S").decode({"blocks": blocks}, 256))
    assert torch.equal(rounded_like("gguf:IQ3_S", {"blocks": blocks}, weight), weight + (stored - weight))
    other = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    stood_in = rounded_like("gguf:IQ3_S", {"blocks": blocks}, other)
    error = float((stood_in - other).square().sum() / other.square().sum())
    assert error == pytest.approx(USUAL_ERRORS["gguf:IQ3_S"])
    nothing = torch.zeros(1, 256)
    assert torch.equal(rounded_like("gguf:TQ2_0", {"blocks": np.zeros((1, 66), np.uint8)}, nothing), nothing)
