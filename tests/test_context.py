"""Windows and calibration sequences that are longer than a model's context: shortened, refused, or warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from verified_models import make_artifact
from verified_models import text as text

import lqexport
from lqexport.converters.gguf.writer import write
from lqexport.errors import UserError
from lqexport.evaluation import papers
from lqexport.evaluation.fitting import fitted, window_warnings
from lqexport.evaluation.protocols import HF_2048, LLAMACPP_512, PROTOCOLS
from lqexport.planning.dryrun import preview
from lqexport.recipe import Recipe

POSITIONS = 128
GPT2 = {"architectures": ["GPT2LMHeadModel"]}
LLAMA = {"architectures": ["LlamaForCausalLM"]}


class Messages:
    """A listener that keeps the messages."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def stage(self, description: str, total: float) -> None: ...

    def advance(self, amount: float) -> None: ...

    def message(self, text: str) -> None:
        self.heard.append(text)


@pytest.fixture(scope="module")
def short(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of 128 positions."""
    folder = tmp_path_factory.mktemp("short") / "model"
    config = GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short_file(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its GGUF file, in Q8_0."""
    folder = tmp_path_factory.mktemp("file")
    write(make_artifact(short, folder / "artifact", "gguf:Q8_0"), folder / "model.gguf")
    return folder / "model.gguf"


def test_windows_are_as_long_as_learned_positions() -> None:
    hf, llamacpp = (fitted(protocol, GPT2 | {"n_positions": 100}) for protocol in (HF_2048, LLAMACPP_512))
    assert (hf.name, hf.window, hf.first, hf.bos) == ("hf-100", 100, 1, False)
    # As in llama-perplexity, the second half of a window is scored.
    assert (llamacpp.name, llamacpp.window, llamacpp.first, llamacpp.bos) == ("llama.cpp-100", 100, 51, True)
    with pytest.raises(UserError, match="has 7 positions"):
        fitted(HF_2048, GPT2 | {"n_positions": 7})


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_windows_that_fit_stay(protocol: object) -> None:
    assert isinstance(protocol, type(HF_2048))
    for config in (GPT2 | {"n_positions": protocol.window}, LLAMA | {"max_position_embeddings": protocol.window}):
        assert fitted(protocol, config) is protocol
        assert window_warnings(protocol, config) == []


def test_positions_that_config_json_leaves_out_are_those_of_transformers() -> None:
    """GPT-2 has 1024 positions by default."""
    assert fitted(HF_2048, GPT2).window == 1024
    assert fitted(LLAMACPP_512, GPT2) is LLAMACPP_512


def test_a_rotary_model_runs_past_its_context_with_a_warning() -> None:
    config = LLAMA | {"max_position_embeddings": 100}
    assert fitted(HF_2048, config) is HF_2048
    (warning,) = window_warnings(HF_2048, config)
    assert warning.startswith("The model was trained on 100 positions")


@pytest.mark.parametrize("engine", ["lqexport", pytest.param("llama.cpp", marks=pytest.mark.llamacpp)])
def test_verify_fits_the_windows(short: Path, short_file: Path, text: str, engine: str) -> None:
    result = lqexport.verify(
        short_file, str(short), text=text, windows=2, engine=engine, protocols=("llama.cpp-512", "hf-2048")  # type: ignore[arg-type]
    )  # fmt: skip
    assert result.failed == []
    measured = [(evaluation.protocol, evaluation.tokens) for evaluation in result.evaluations]
    assert measured == [("llama.cpp-128", 2 * 63), ("hf-128", 2 * 127)]
    assert all(evaluation.kl < 1e-3 for evaluation in result.evaluations)
    said = [sentence for sentence in result.warnings if "positions" in sentence]
    assert [sentence.split(".")[0] for sentence in said] == [
        "The model has 128 positions, so its windows have 128 tokens instead of the 512 of llama",
        "The model has 128 positions, so its windows have 128 tokens instead of the 2048 of hf-2048",
    ]


def test_compare_and_eval_fit_the_windows(short: Path, short_file: Path, text: str) -> None:
    compared, evaluated = Messages(), Messages()
    result = lqexport.compare([short_file], str(short), text=text, windows=2, listener=compared)
    assert (result.protocol, result.files[0].evaluation.tokens) == ("llama.cpp-128", 2 * 63)
    perplexities = lqexport.perplexity(short_file, [text], windows=2, listener=evaluated)
    assert [(each.protocol, each.tokens) for each in perplexities] == [("hf-128", 2 * 127)]
    for messages in (compared, evaluated):
        assert len([sentence for sentence in messages.heard if "has 128 positions" in sentence]) == 1


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_texts_of_the_papers_fit_too(name: str, short_file: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(papers, "documents", lambda *_: [Path(text).read_text(encoding="utf-8")])
    (perplexity,) = lqexport.perplexity(short_file, [name], windows=2)
    assert (perplexity.protocol, perplexity.windows, perplexity.tokens) == ("hf-128", 2, 2 * 127)


def test_sequences_beyond_learned_positions_are_refused_before_any_work(short: Path, text: str, tmp_path: Path) -> None:
    recipe = Recipe(str(short), "gguf:Q4_0", calibration=text, sequence_length=POSITIONS + 1)
    for attempt in (lqexport.quantize, preview):
        with pytest.raises(UserError, match="take at most 128 as --sequence-length"):
            attempt(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    without = Recipe(str(short), "gguf:Q4_0", method="rtn", sequence_length=POSITIONS + 1)
    assert preview(without, tmp_path / "out").tensors  # rounding needs no sequences


def test_sequences_beyond_a_rotary_context_are_warned_of(smaller_model: Path, text: str, tmp_path: Path) -> None:
    """Its context is 512 tokens."""
    listener = Messages()
    options = {"calibration": text, "samples": 2, "tune": 0, "asymmetric": False}
    recipe = Recipe(str(smaller_model), "gguf:Q4_0", sequence_length=600, **options)  # type: ignore[arg-type]
    lqexport.quantize(recipe, tmp_path / "out", listener=listener)
    assert len([sentence for sentence in listener.heard if "was trained on 512 positions" in sentence]) == 1
