"""`lqexport check`: what is wrong with a file by itself is named, and a right file has no problem."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
from gguf import GGUFValueType
from rewritten_files import Content, Spoil, content_of, rewritten
from spoiled_files import gguf_file, save_sharp
from typer.testing import CliRunner

from lqexport.checking.blocks import LAYOUTS, counted
from lqexport.checking.checking import check_file
from lqexport.checking.opened import open_file
from lqexport.checking.sizes import _is_among
from lqexport.checking.splitter_names import SPLITTERS
from lqexport.cli.app import app
from lqexport.converters.gguf.header import TensorData
from lqexport.converters.gguf.pretokenizers import SPLITTERS as KNOWN
from lqexport.errors import UserError
from lqexport.verification.checks import check
from lqexport.verification.verifying import verify

PREFIX = "tokenizer.ggml."
UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharp(tmp_path_factory.mktemp("model") / "untied", "untied", tiny_model)


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right file of Q4_0."""
    return gguf_file(model, tmp_path_factory.mktemp("file"), "gguf:Q4_0")


def setting(key: str, value: object) -> Spoil:
    return lambda content: content.values.update({key: value})


def without(*keys: str) -> Spoil:
    def spoil(content: Content) -> None:
        for key in [key for key in content.values if key.startswith(keys)]:
            del content.values[key]

    return spoil


def item(key: str, index: int, value: object) -> Spoil:
    return lambda content: content.values[key].__setitem__(index, value)


def no_tensor(content: Content) -> None:
    del content.tensors[UP]


def strange_tensor(content: Content) -> None:
    content.tensors["blk.1.ffn_upper.weight"], content.forms["blk.1.ffn_upper.weight"] = (
        content.tensors[UP], content.forms[UP],
    )  # fmt: skip


def block_beyond(content: Content) -> None:
    content.tensors["blk.9.attn_norm.weight"] = content.tensors["blk.1.attn_norm.weight"]
    content.forms["blk.9.attn_norm.weight"] = content.forms["blk.1.attn_norm.weight"]


def nan_scale(content: Content) -> None:
    content.tensors[UP][0, :2] = 0, 0x7E


def infinite_gain(content: Content) -> None:
    content.tensors["output_norm.weight"][3] = np.inf


def zero_scale(content: Content) -> None:
    content.tensors[UP][0, :2] = 0


def huge_scale(content: Content) -> None:
    content.tensors[UP][0, :2] = 0xFF, 0x7B


def template(text: str) -> Spoil:
    return lambda content: content.add("tokenizer.chat_template", text, GGUFValueType.STRING)


def called(name: str) -> Spoil:
    return lambda content: content.add("general.name", name, GGUFValueType.STRING)


WRONG: dict[str, tuple[Spoil, str, str, str]] = {
    "no architecture": (without("general.architecture"), "error", "settings", "no general.architecture"),
    "no block count": (without("llama.block_count"), "error", "settings", "There is no llama.block_count"),
    "no context": (setting("llama.context_length", 0), "error", "settings", "context_length is 0, which is no count"),
    "no epsilon": (without("llama.attention.layer_norm"), "error", "settings", "layer_norm_rms_epsilon and no"),
    "large epsilon": (
        setting("llama.attention.layer_norm_rms_epsilon", 0.1), "error", "settings", "models have 1e-12 to 0.001",
    ),
    "rope base 0": (setting("llama.rope.freq_base", 0.0), "error", "settings", "must be above 0"),
    "rope base 1": (setting("llama.rope.freq_base", 1.0), "warning", "settings", "models have 10000 and more"),
    "odd rotation": (setting("llama.rope.dimension_count", 31), "error", "settings", "31 columns of each head of 32"),
    "heads do not divide": (setting("llama.attention.head_count_kv", 3), "error", "settings", "cannot share 3"),
    "more key heads": (setting("llama.attention.head_count_kv", 4), "error", "shapes", "attn_k.weight is [64, 128]"),
    "width": (setting("llama.feed_forward_length", 300), "error", "shapes", "ffn_gate.weight is [256, 128], not [300"),
    "missing tensor": (no_tensor, "error", "tensors", f"1 tensors are missing that llama has: {UP}"),
    "unknown tensor": (strange_tensor, "error", "tensors", "not of the architecture llama: blk.1.ffn_upper.weight"),
    "block beyond": (block_beyond, "error", "tensors", "block_count is 3, and there is a block with the number 9"),
    "more blocks": (setting("llama.block_count", 4), "error", "tensors", "block_count is 4, and only 3 blocks have"),
    "NaN scale": (nan_scale, "error", "values", f"not a number: {UP} (1)"),
    "infinite gain": (infinite_gain, "error", "values", "not a number: output_norm.weight (1)"),
    "zero scale": (zero_scale, "warning", "values", f"scale is 0 although their codes differ: {UP} (1)"),
    "huge scale": (huge_scale, "warning", "values", f"more than 1000 times the tensor's median: {UP} (1)"),
    "no tokenizer": (without("tokenizer."), "error", "vocabulary", "has no tokenizer"),
    "unknown tokenizer": (setting(f"{PREFIX}model", "gpt9"), "error", "vocabulary", "'gpt9', which llama.cpp does not"),
    "no tokens": (without(f"{PREFIX}tokens"), "error", "vocabulary", "tokens is missing"),
    "token twice": (item(f"{PREFIX}tokens", 400, "a"), "error", "vocabulary", "1 tokens have the text of another: 'a'"),
    "empty token": (item(f"{PREFIX}tokens", 0, ""), "warning", "vocabulary", "1 tokens have no text"),
    "missing letter": (item(f"{PREFIX}tokens", 5, "zzz"), "warning", "vocabulary", "1 of 243 letters"),
    "type of a token": (item(f"{PREFIX}token_type", 7, 9), "error", "vocabulary", "does not exist, such as 9"),
    "few types": (lambda content: content.values[f"{PREFIX}token_type"].pop(), "error", "vocabulary", "511 values for"),
    "no types": (without(f"{PREFIX}token_type"), "warning", "vocabulary", "special tokens are taken as plain text"),
    "plain end": (item(f"{PREFIX}token_type", 0, 1), "warning", "vocabulary", "token 0, which ends a text, is not a"),
    "unknown merge": (item(f"{PREFIX}merges", 3, "xq zz"), "error", "vocabulary", "1 merges name tokens that do not"),
    "no merges": (without(f"{PREFIX}merges"), "error", "vocabulary", "no tokenizer.ggml.merges"),
    "end beyond": (setting(f"{PREFIX}eos_token_id", 5000), "error", "vocabulary", "eos_token_id is 5000, and there"),
    "no end": (without(f"{PREFIX}eos_token_id"), "warning", "vocabulary", "llama.cpp takes an id of its own"),
    "unknown splitter": (setting(f"{PREFIX}pre", "mine"), "error", "vocabulary", "'mine', which is not among"),
    "no splitter": (without(f"{PREFIX}pre"), "warning", "vocabulary", "splits words by its default"),
    "template": (template("{% if messages %}"), "error", "template", "chat_template does not parse: line 1"),
    "no template": (called("Tiny-8B-Instruct"), "warning", "template", "'Tiny-8B-Instruct' and has no chat template"),
    "type": (setting("general.file_type", 15), "warning", "name", "general.file_type says Q4_K_M, and the matrices"),
}  # fmt: skip
"""Name -> how a right file is spoiled, and the level, area and a part of the sentence of the problem."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_and_its_problem(name: str, right: Path, tmp_path: Path) -> None:
    spoil, level, area, said = WRONG[name]
    result = check_file(rewritten(right, tmp_path / "model.gguf", spoil), engine=False)
    assert [found for found in result.problems if (found.level, found.area) == (level, area) and said in found.sentence]
    assert bool(result.errors) is (level == "error")


def test_a_right_file_has_no_problem(right: Path, tmp_path: Path) -> None:
    result = check_file(rewritten(right, tmp_path / "Model-Q4_0.GGUF", lambda content: None), engine=False)
    assert result.problems == []
    assert (result.sizes.tensors, result.sizes.type, result.architecture) == (30, "Q4_0", "llama")
    assert result.sizes.weights == sum(int(np.prod(tensor.shape)) for tensor in gguf.GGUFReader(right).tensors)


def test_templates_of_chat_models_parse(right: Path, tmp_path: Path) -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"

    def spoil(content: Content) -> None:
        template(text)(content)
        called("Tiny-it")(content)

    assert check_file(rewritten(right, tmp_path / "tiny-instruct.gguf", spoil), engine=False).problems == []


def damaged(right: Path, to: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(right.read_bytes())
    change(content)
    to.write_bytes(content)
    return to


def offsets_swapped(content: bytearray) -> None:
    """Makes the header's first two tensors of the same shape change places in the file."""
    first, second = (
        content.index(name) + len(name) + 4 + 16 + 4 for name in (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight")
    )
    content[first : first + 8], content[second : second + 8] = content[second : second + 8], content[first : first + 8]


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        (lambda content: content.__delitem__(slice(-40, None)), "error", "is truncated or damaged"),
        (lambda content: content.extend(bytes(100)), "warning", "100 bytes after its last tensor"),
        (offsets_swapped, "error", "is not where the one before it ends"),
        (lambda content: content.__setitem__(slice(4, 8), b"\x09\0\0\0"), "error", "its version is 9"),
    ],
)
def test_structure(change: Callable[[bytearray], None], level: str, said: str, right: Path, tmp_path: Path) -> None:
    result = check_file(damaged(right, tmp_path / "model.gguf", change), engine=False)
    assert [(found.level, found.area) for found in result.problems if said in found.sentence] == [(level, "structure")]


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("spoil", "loads"), [(setting(f"{PREFIX}pre", "mine"), False), (lambda content: None, True)], ids=["wrong", "right"]
)
def test_llamacpp_loads_the_file_too(spoil: Spoil, loads: bool, right: Path, tmp_path: Path) -> None:
    result = check_file(rewritten(right, tmp_path / "model.gguf", spoil))
    assert result.engine == ("loads" if loads else "refuses")
    assert bool([found for found in result.errors if found.area == "engine"]) is not loads


def test_what_llamacpp_loads_is_only_a_doubt(right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer llama.cpp may know a splitter that the table here does not."""
    monkeypatch.setattr("lqexport.checking.checking.load", lambda file: ("loads", []))
    result = check_file(rewritten(right, tmp_path / "model.gguf", setting(f"{PREFIX}pre", "newer")))
    assert ([found.level for found in result.problems], result.errors) == (["warning"], [])


def test_verify_fails_a_file_without_a_tokenizer(right: Path, model: Path, tmp_path: Path) -> None:
    path = rewritten(right, tmp_path / "model.gguf", without("tokenizer."))
    result = verify(path, str(model), windows=1)
    assert [sentence for sentence in result.failed if "has no tokenizer" in sentence]


def test_the_command_takes_files_and_folders(right: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "B.GGUF", "notes.txt", "c-00002-of-00002.gguf", "c-00001-of-00002.gguf"):
        shutil.copy(right, tmp_path / name)
    (tmp_path / "._a.gguf").touch()  # macOS leaves such files on other disks
    rewritten(right, tmp_path / "wrong.gguf", without("tokenizer."))
    shown = CliRunner().invoke(app, ["check", str(tmp_path), "--json"])
    content = json.loads(shown.stdout)
    verdicts = {Path(entry["file"]).name: entry["passed"] for entry in content["files"]}
    assert verdicts == {"a.gguf": True, "B.GGUF": True, "c-00001-of-00002.gguf": True, "wrong.gguf": False}
    assert (shown.exit_code, content["passed"]) == (1, False)


def test_the_command_prints_a_table_and_the_problems(right: Path, tmp_path: Path) -> None:
    rewritten(right, tmp_path / "odd.gguf", without(f"{PREFIX}pre"))
    shown = CliRunner().invoke(app, ["check", str(right), str(tmp_path / "odd.gguf")])
    assert shown.exit_code == 0  # a warning does not fail a file
    assert "llama         Q4_0" in shown.stdout
    assert "odd.gguf: warning: There is no tokenizer.ggml.pre" in shown.stdout


def test_a_bare_environment_changes_nothing(right: Path, tmp_path: Path) -> None:
    """No folder for temporary files, no home that can be written, few open files, and an output of ASCII alone."""
    path = rewritten(right, tmp_path / "größe.gguf", item(f"{PREFIX}tokens", 400, "Ġ"))
    (home := tmp_path / "home").mkdir(mode=0o555)
    bare = {"TMPDIR": "/nowhere", "HOME": str(home), "HF_HOME": str(home / "hf"), "PYTHONIOENCODING": "ascii"}
    bare |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lqexport", "check", path], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=os.environ | bare, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert r"error: 1 tokens have the text of another: '\u0120'" in done.stdout


def test_what_is_not_there_is_a_wrong_command(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["check", str(tmp_path / "nothing.gguf")]).exit_code == 2
    with pytest.raises(UserError, match=r"There is no \.gguf file in"):
        check(tmp_path)


def test_with_a_source_verify_is_asked_too(
    right: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lqexport.verification.text_share.WINDOWS", 1)
    path = rewritten(right, tmp_path / "model.gguf", setting("llama.rope.freq_base", 15000.0))
    assert not check(path).failed
    result = check([path, right], str(model)).files
    assert [found.area for found in result[0].errors] == ["source"] * len(result[0].errors) != []
    assert result[1].errors == []


def with_blocks(blocks: int, path: Path) -> Path:
    """Writes a Llama of hidden size 32 without a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", blocks if key == "block_count" else 32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    block = {f"attn_{name}": 2 for name in ("q", "k", "v", "output")} | {
        f"ffn_{name}": 2 for name in ("gate", "up", "down")
    }
    block |= {"attn_norm": 1, "ffn_norm": 1}
    matrix, vector = (
        gguf.quantize(np.eye(32, dtype=np.float32), gguf.GGMLQuantizationType.Q8_0),
        np.ones(32, np.float32),
    )
    names = {f"blk.{number}.{name}": axes for number in range(blocks) for name, axes in block.items()}
    for name, axes in ({"token_embd": 2, "output_norm": 1} | names).items():
        form = gguf.GGMLQuantizationType.Q8_0 if axes == 2 else None
        writer.add_tensor(f"{name}.weight", matrix if axes == 2 else vector, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ten_thousand_tensors_take_linear_time(tmp_path: Path) -> None:
    """Four times the tensors take about four times as long, not sixteen times."""
    seconds = []
    for blocks in (280, 1120):
        path = with_blocks(blocks, tmp_path / f"{blocks}.gguf")
        begin = time.process_time()
        result = check_file(path, engine=False)
        seconds.append(time.process_time() - begin)
        assert result.sizes.tensors == 2 + 9 * blocks
        assert [found.area for found in result.problems] == ["vocabulary"]
    assert seconds[1] < 10 * seconds[0] + 0.5


@pytest.mark.parametrize(
    ("tensor_type", "change"),
    [("TQ2_0", (0, 0xFF)), ("TQ1_0", (0, 0x01)), ("MXFP4", (0, 0xFF)), ("NVFP4", (0, 0x7F))],
)
def test_codes_that_a_type_does_not_define(tensor_type: str, change: tuple[int, int], tmp_path: Path) -> None:
    size = LAYOUTS[tensor_type].size
    blocks = np.zeros((4, size), np.uint8)
    assert tensor_counts(blocks, tensor_type, tmp_path) == 0
    blocks[2, change[0]] = change[1]
    assert tensor_counts(blocks, tensor_type, tmp_path) == 1


def tensor_counts(blocks: np.ndarray, tensor_type: str, folder: Path) -> int:
    blocks.tofile(path := folder / "blocks")
    return counted(TensorData((4, 256), tensor_type, path, 0, blocks.nbytes, 0)).undefined


def test_blocks_are_as_large_as_ggml_has_them() -> None:
    sizes = {member.name: size for member, (_, size) in gguf.GGML_QUANT_SIZES.items()}
    assert {name: layout.size for name, layout in LAYOUTS.items()} == {name: sizes[name] for name in LAYOUTS}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_scales_are_where_gguf_has_them() -> None:
    """With all scales of a block set to infinity, ggml decodes no finite number."""
    for name, layout in LAYOUTS.items():
        if layout.scales:
            block = np.full((1, layout.size), 0x35, np.uint8)
            block[0, layout.scales[0] : layout.scales[0] + 2] = 0, 0x7C
            values = libgguf.dequantize_rows(block, gguf.GGMLQuantizationType[name])
            assert not np.isfinite(values).all(), name


def test_names_of_files() -> None:
    assert _is_among("Q4_K_M", {"Q4_K", "Q6_K"})
    assert _is_among("Q4_K_M", {"Q5_0", "Q8_0"})  # the fallback of narrow matrices
    assert _is_among("Q3_K_XL", {"Q3_K"})
    assert _is_among("IQ3_M", {"IQ3_S"})
    assert _is_among("TQ2_0_MIX", {"TQ2_0", "Q6_K"})
    assert not _is_among("Q8_0", {"Q4_0"})


def test_our_splitters_are_llamacpps() -> None:
    assert {name for splitter in KNOWN for name in splitter.names} <= SPLITTERS


def test_content_is_rewritten_as_it_was(right: Path, tmp_path: Path) -> None:
    copy = rewritten(right, tmp_path / "copy.gguf", lambda content: None)
    assert open_file(copy).metadata == open_file(right).metadata
    assert all(np.array_equal(data, content_of(copy).tensors[name]) for name, data in content_of(right).tensors.items())
