"""A model in several GGUF files, read by llama.cpp, by our own reader, by `verify` and by `inspect`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from typer.testing import CliRunner

from lqexport.cli.app import app
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.split import in_files, split_paths
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.exporting import export
from lqexport.models.inspect import inspect
from lqexport.models.source import open_source
from lqexport.sizes import split_size
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import file_digest
from lqexport.verification.publish import model_files
from lqexport.verification.verifying import verify

SPLIT_SIZE = "600K"


@pytest.fixture(scope="module")
def artifact(rounded_artifact: Callable[..., Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return rounded_artifact(tmp_path_factory.mktemp("split") / "artifact", "gguf:Q8_0")


@pytest.fixture(scope="module")
def whole(artifact: Artifact) -> Path:
    return export(artifact.folder, artifact.folder.parent / "whole.gguf")


@pytest.fixture(scope="module")
def first(artifact: Artifact) -> Path:
    return export(artifact.folder, artifact.folder.parent / "split" / "model.gguf", split_max_size=SPLIT_SIZE)


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    """The first file of a copy of the split model, which tests damage."""
    return shutil.copytree(first.parent, tmp_path / "copy") / first.name


def test_names_keys_and_sizes_are_those_of_gguf_split(first: Path, whole: Path) -> None:
    files = sorted(first.parent.iterdir())
    assert first == files[0]
    assert len(files) == 3
    assert [path.name for path in files] == [f"model-{i:05}-of-{len(files):05}.gguf" for i in range(1, len(files) + 1)]
    tensors = []
    for number, path in enumerate(files):
        reader = GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        expected = {"split.no": number, "split.count": len(files), "split.tensors.count": 20}
        assert {name: keys[name] for name in expected} == expected
        assert ("general.architecture" in keys) == (number == 0)
        assert {str(reader.fields[name].types[0].name) for name in ("split.no", "split.count")} == {"UINT16"}
        sizes = [int(tensor.n_bytes) for tensor in reader.tensors]
        assert sum(sizes) <= split_size(SPLIT_SIZE) or len(sizes) == 1
        tensors += [(tensor.name, tensor.data.tobytes()) for tensor in reader.tensors]
    assert tensors == [(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(whole).tensors]


@pytest.mark.llamacpp
def test_llamacpp_computes_the_same(first: Path, whole: Path) -> None:
    tokens = [0, 5, 77, 300, 12, 400]
    with LlamaCpp(whole, 16, threads=1) as one, LlamaCpp(first, 16, threads=1) as several:
        assert np.array_equal(one.logits(tokens), several.logits(tokens))
        assert one.tokenize("Hello world") == several.tokenize("Hello world")


def test_our_readers_see_one_model(first: Path, whole: Path) -> None:
    one, several = GGUFModel(whole), GGUFModel(first)
    assert one.names() == several.names()
    assert one.config == several.config
    assert all(np.array_equal(one.read(name), several.read(name)) for name in one.names())
    assert inspect(first).entries == inspect(whole).entries
    tokens = [open_source(str(path)).tokenizer()("Hello world").input_ids for path in (first, whole)]
    assert tokens[0] == tokens[1]


def test_verify(first: Path, artifact: Artifact, tiny_model: Path, text: Path) -> None:
    result = verify(first, str(tiny_model), text=str(text), windows=1, artifact=artifact.folder)
    assert not result.failed
    assert result.sha256 == file_digest(*sorted(first.parent.iterdir()))


def test_fingerprint_is_of_all_files(copied: Path) -> None:
    before = open_source(str(copied)).fingerprint
    last = sorted(copied.parent.iterdir())[-1]
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    assert open_source(str(copied)).fingerprint != before


def test_command(artifact: Artifact, tmp_path: Path) -> None:
    command = ["to-gguf", str(artifact.folder), str(tmp_path / "a.gguf"), "--split-max-size"]
    result = CliRunner().invoke(app, [*command, SPLIT_SIZE])
    assert result.exit_code == 0
    assert "a-00001-of-00003.gguf and 2 more" in result.output
    result = CliRunner().invoke(app, [*command, "2T"])
    assert result.exit_code == 2
    assert "like 2G" in result.output


def test_a_model_that_fits_stays_whole(artifact: Artifact, whole: Path, tmp_path: Path) -> None:
    path = export(artifact.folder, tmp_path / "model.gguf", split_max_size="1G")
    assert path == tmp_path / "model.gguf"
    assert path.read_bytes() == whole.read_bytes()


class Tensor:
    """A tensor of so many bytes."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "expected"),
    [
        ([10, 10, 10], None, [3]),
        ([64, 64, 64], 128, [2, 1]),
        ([60, 60, 60], 128, [2, 1]),  # padded to 64
        ([65, 60], 128, [1, 1]),
        ([500, 10, 10, 500], 100, [1, 2, 1]),
    ],
)
def test_files_are_filled_in_order(sizes: list[int], max_bytes: int | None, expected: list[int]) -> None:
    assert [len(file) for file in in_files([Tensor(size) for size in sizes], max_bytes)] == expected


@pytest.mark.parametrize("text", ["", "2", "G", "0G", "2g", "1.5G", "-1M", "2GB", " 2G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="like 2G"):
        split_size(text)


def test_sizes_are_decimal() -> None:
    assert [split_size(text) for text in ("800K", "500M", "2G")] == [800_000, 500_000_000, 2_000_000_000]


def test_names() -> None:
    assert split_paths(Path("a/b.gguf"), 1) == [Path("a/b.gguf")]
    assert split_paths(Path("a/b.c.gguf"), 2) == [Path("a/b.c-00001-of-00002.gguf"), Path("a/b.c-00002-of-00002.gguf")]


def test_damage_leaves_no_file(artifact: Artifact, tmp_path: Path) -> None:
    """Damages the last tensor, so that the writer notices it when all files but the last are written."""
    damaged = Artifact(shutil.copytree(artifact.folder, tmp_path / "artifact"))
    stored = damaged.read("model.layers.1.mlp.down_proj.weight")
    stored.planes["blocks"][3, 5] ^= 1
    damaged.write(stored)
    with pytest.raises(UserError, match="damaged"):
        gguf_writer.write(damaged, tmp_path / "out" / "model.gguf", split_max_size=split_size(SPLIT_SIZE))
    assert list((tmp_path / "out").iterdir()) == []


def replace_content(path: Path, source: Path) -> None:
    path.write_bytes(source.read_bytes())


def test_files_that_do_not_belong_together(copied: Path, whole: Path) -> None:
    files = sorted(copied.parent.iterdir())
    with pytest.raises(UserError, match=r"not the first of the 3 files .* give model-00001-of-00003\.gguf\."):
        GGUFModel(files[1])
    kept = files[0].rename(copied.parent / "kept")
    with pytest.raises(UserError, match=r"give model-00001-of-00003\.gguf, which is missing beside it\."):
        GGUFModel(files[1])
    kept.rename(files[0])
    replace_content(files[1], files[2])
    with pytest.raises(UserError, match="is not file 2 of 3"):
        GGUFModel(copied)
    replace_content(files[1], whole)
    with pytest.raises(UserError, match="is not file 2 of 3"):
        GGUFModel(copied)
    files[1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.gguf is missing"):
        GGUFModel(copied)
    with pytest.raises(UserError, match="renamed"):
        GGUFModel(copied.rename(copied.with_name("renamed.gguf")))


@pytest.mark.parametrize(("number", "count"), [(7, 3), (0, 0xFFFF + 1)])
def test_numbers_that_cannot_be(tmp_path: Path, number: int, count: int) -> None:
    writer = GGUFWriter(tmp_path / "model-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint32("split.count", count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=f"it is number {number} of {count} files"):
        GGUFModel(tmp_path / "model-00001-of-00003.gguf")


def test_all_files_are_published(first: Path) -> None:
    assert list(model_files(first).values()) == sorted(first.parent.iterdir())


def test_a_tensor_too_few(copied: Path, first: Path) -> None:
    content = first.read_bytes()
    old, new = (b"split.tensors.count" + (5).to_bytes(4, "little") + count.to_bytes(4, "little") for count in (20, 21))
    assert content.count(old) == 1
    copied.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match="hold 20 tensors, not the 21"):
        GGUFModel(copied)
