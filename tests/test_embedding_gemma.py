"""EmbeddingGemma: a Gemma 3 whose tokens all see each other, and two matrices behind the pooling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import GEMMA3_ROPE, SIZES, WIDE_HEADS, make_tokenizer, randomized
from family_cases import pieces as pieces
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from torch.nn.functional import normalize
from transformers import Gemma3TextConfig, Gemma3TextModel

import lqexport
from lqexport.calibration.sequences import load_calibration
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.models.architectures import normalized
from lqexport.converters.targets import plan
from lqexport.errors import UserError
from lqexport.evaluation.embeddings import embeddings, engine_embeddings, sentences, token_ids
from lqexport.evaluation.llamacpp_process import LlamaCppProcess
from lqexport.evaluation.llamacpp_quantizer import quantize as llamacpp_quantize
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Silent
from lqexport.target import Target

PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]
ROPE = {key: settings | {"rope_type": "default"} for key, settings in GEMMA3_ROPE.items()}
del ROPE["full_attention"]["factor"]
CONFIG = SIZES | WIDE_HEADS | {"num_hidden_layers": 4, "layer_types": [*PATTERN, PATTERN[0]], "rope_parameters": ROPE}
CONFIG |= {"use_bidirectional_attention": True, "pad_token_id": 0}
DENSE = ("2_Dense", "3_Dense")


def write_dense(folder: Path, sizes: tuple[int, ...], **settings: Any) -> None:
    """Writes modules Dense as sentence-transformers does, between these sizes, and the list of all modules."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *(("Dense", name) for name in DENSE[: len(sizes) - 1])]
    for name, columns, rows in zip(DENSE, sizes, sizes[1:], strict=False):
        (folder / name).mkdir(exist_ok=True)
        options = {"activation_function": "torch.nn.modules.linear.Identity", "bias": False} | settings
        (folder / name / "config.json").write_text(json.dumps(options))
        save_file({"linear.weight": torch.randn(rows, columns) * columns**-0.5}, folder / name / "model.safetensors")
    listed = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{name}"} for i, (name, path) in
              enumerate([*modules, ("Normalize", "4_Normalize")])]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(listed))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> Path:
    """A random EmbeddingGemma of 4 blocks with windows of 16 tokens, 8 to each side."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    tokenizer = make_tokenizer("pieces without prefix", pieces)
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        randomized(Gemma3TextModel(Gemma3TextConfig(**CONFIG)), "gemma3").save_pretrained(folder)
        write_dense(folder, (64, 256, 64))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of forty sentences, many of them longer than a window."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(" ".join(f"The parser number {n} {'adds an argument ' * (1 + n % 9)}here." for n in range(40)))
    return path


@torch.no_grad()
def by_transformers(folder: Path, ids: list[list[int]], dense: tuple[str, ...] = DENSE) -> Tensor:
    model, pooled = Gemma3TextModel.from_pretrained(folder), []
    for sentence in ids:
        state = model(torch.tensor([sentence])).last_hidden_state[0].mean(0)
        for name in dense:
            state = load_file(folder / name / "model.safetensors")["linear.weight"] @ state
        pooled.append(normalize(state, dim=0))
    return torch.stack(pooled)


def exported(folder: Path, target: str, out: Path, **options: Any) -> Path:
    """Quantizes a folder and returns the GGUF file."""
    lqexport.quantize(Recipe(str(folder), target, **options), out / "artifact")
    lqexport.export(out / "artifact", out / "model.gguf")
    return out / "model.gguf"


@pytest.fixture(scope="module")
def f16(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(encoder, "gguf:F16", tmp_path_factory.mktemp("f16"))


@pytest.mark.llamacpp
@pytest.mark.parametrize("dense", [DENSE, ()])
def test_embeddings_are_those_of_transformers(
    dense: tuple[str, ...], encoder: Path, f16: Path, prose: Path, tmp_path: Path
) -> None:
    folder, file = encoder, f16
    if not dense:
        folder = shutil.copytree(encoder, tmp_path / "model")
        write_dense(folder, (64,))
        file = exported(folder, "gguf:F16", tmp_path)
    ids = token_ids(open_source(str(folder)).tokenizer(), sentences(prose.read_text()), 512)
    assert max(map(len, ids)) > 24
    expected = by_transformers(folder, ids, dense)
    assert expected.std(0).mean() > 0.01
    with LlamaCppProcess(file, max(map(len, ids)), embeddings=True) as engine:
        theirs = engine_embeddings(engine, ids, Silent())
    of_source, of_file = (embeddings(BlockModel(open_source(str(path))), ids, Silent(), "") for path in (folder, file))
    torch.testing.assert_close(of_source, expected, rtol=0, atol=1e-5)
    for embedded in (of_file, theirs):
        assert float((embedded * expected).sum(1).min()) > 0.9999


@pytest.mark.llamacpp
def test_a_quantized_file_is_verified(encoder: Path, text: Path, prose: Path, tmp_path: Path) -> None:
    options = {"calibration": str(text), "samples": 8, "sequence_length": 32}
    file = exported(encoder, "gguf:Q4_0", tmp_path, **options)
    for engine in ("lqexport", "llama.cpp"):
        result = lqexport.verify(file, str(encoder), text=str(prose), engine=engine, artifact=tmp_path / "artifact")
        assert result.failed == result.warnings == []
        assert result.similarity is not None
        assert result.similarity.cosine > 0.93
    assert {GGUFModel(file).codec_name(f"{name}.linear.weight") for name in DENSE} == {"gguf:Q8_0"}


def test_windows_of_text_stand_between_the_ends(encoder: Path, text: Path) -> None:
    tokenizer = open_source(str(encoder)).tokenizer()
    tokens = load_calibration(str(text), tokenizer, samples=3, sequence_length=20, seed=0, encoder=True).tokens
    assert tokens[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert tokens[:, -1].tolist() == [tokenizer.eos_token_id] * 3


def test_config_comes_back_and_the_window_is_not_halved(encoder: Path, f16: Path) -> None:
    """transformers halves the window of such a model when it makes a config, and doubles it when it writes one."""
    source, file = open_source(str(encoder)).config, open_source(str(f16)).config
    keys = ("architectures", "sliding_window", "layer_types", "head_dim", "dense_2_feat_out", "dense_3_feat_in")
    assert {key: file[key] for key in keys} == {key: source[key] for key in keys}
    assert (source["sliding_window"], source["dense_2_feat_out"], source["dense_3_feat_in"]) == (16, 256, 256)
    without = {key: value for key, value in source.items() if key != "sliding_window"}
    assert normalized(without)["sliding_window"] == 4096


@pytest.mark.llamacpp
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q2_K_M"])
def test_mixes_are_llamacpps(mix: str, encoder: Path, f16: Path, tmp_path: Path) -> None:
    source = open_source(str(encoder))
    planned = plan(Target.parse(f"gguf:{mix}"), source.config, {name: source.shape(name) for name in source.names()})
    llamacpp_quantize(f16, tmp_path / "theirs.gguf", mix.removesuffix("_M") if mix == "Q2_K_M" else mix, threads=1)
    theirs = GGUFModel(tmp_path / "theirs.gguf")
    assert {tensor.name: tensor.codec_name for tensor in planned} == {
        name: theirs.codec_name(name) for name in theirs.names()
    }


@pytest.mark.parametrize(
    ("sizes", "settings", "reason"),
    [
        ((64, 256), {}, "1 modules Dense"),
        ((64, 256, 64), {"bias": True}, "bias True"),
        ((64, 256, 64), {"activation_function": "torch.nn.modules.activation.Tanh"}, "activation Tanh"),
    ],
)
def test_other_projections_are_refused(
    sizes: tuple[int, ...], settings: dict[str, Any], reason: str, encoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(encoder, tmp_path / "model")
    write_dense(folder, sizes, **settings)
    with pytest.raises(UserError, match=reason):
        open_source(str(folder))


def test_what_has_no_place_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no place for 2_Dense"):
        lqexport.quantize(Recipe(str(encoder), "native:table-3"), tmp_path / "out")
    folder = shutil.copytree(encoder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"use_bidirectional_attention": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="use_bidirectional_attention True"):
        lqexport.quantize(Recipe(str(folder), "gguf:F16"), tmp_path / "out")
