"""Makes random Llama models, their artifacts and GGUF files, and small tokenizers for them."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from lqexport.converters.gguf import writer as gguf
from lqexport.converters.targets import plan
from lqexport.formats.codec import FLOAT16, Grid, GridCodec, ScaleFormat, Scales
from lqexport.formats.registry import codec_named
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.storage.files import write_json
from lqexport.target import Target

STRINGS: list[str] = json.loads((Path(__file__).parent.parent / "tokenizer_texts.json").read_text(encoding="utf-8"))


def training_text() -> list[str]:
    """Returns lines of text to train tokenizers on."""
    return [*inspect.getsource(argparse).splitlines(keepends=True), *STRINGS * 3]


def byte_level_bpe(splitter: Any = None, *, ignore_merges: bool = False, bos: bool = True) -> Tokenizer:
    """Returns a byte-level BPE of about 500 tokens with <s>, </s>, <unk> and a user-defined <tool>."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
            ]
        )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_bpe()


def make_model(**options: Any) -> LlamaForCausalLM:
    """Returns a random Llama with grouped queries. Norms and biases are random too, so that swapped tensors show."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**(sizes | heads | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None} | options))
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 0.2)
    return model


def random_grid(name: str, rows: int, columns: int) -> tuple[Grid, np.ndarray]:
    """Returns a grid of the codec `name` with random stored numbers, and random codes."""
    codec, random = codec_named(name), np.random.default_rng(rows * columns)

    def scales(scale_format: ScaleFormat | None, size: float) -> Scales | None:
        if scale_format is None:
            return None
        groups, most = scale_format.groups(columns), max(abs(scale_format.low), scale_format.high)
        supers = size * random.uniform(0.5, 1, (rows, groups // scale_format.span)) / most
        subs = random.integers(0, (scale_format.high - scale_format.low) // scale_format.step + 1, (rows, groups))
        subs = scale_format.low + scale_format.step * subs
        if scale_format.floats != FLOAT16:
            supers = np.exp2(np.floor(np.log2(supers)))
        return Scales(scale_format, supers.astype(scale_format.dtype), subs.astype(np.int16))

    span = float(np.ptp(codec.levels))
    offset = scales(codec.offset, -0.2 * (codec.offset.sign if codec.offset else 1))
    grid = Grid(columns, codec.levels, scales(codec.scale, 0.6 / span), offset, codebook=codec.codebook)
    return grid, random_codes(random, codec, rows, columns)


def random_codes(random: np.random.Generator, codec: GridCodec, rows: int, columns: int) -> np.ndarray:
    """Returns random codes uint8 [rows, columns] that a codec can hold."""
    if (book := codec.codebook) is None:
        return random.integers(0, codec.level_count, (rows, columns)).astype(np.uint8)
    indices = random.integers(0, len(book.vectors), (rows, columns // book.width))
    flags = random.integers(0, 256, (rows, columns // 8), dtype=np.uint8)
    if book.lift:
        flags = np.repeat(flags[:, :: book.lift // 8] & 1, book.lift // 8, axis=1)
    elif book.even:
        flags ^= np.unpackbits(flags[..., None], axis=-1).sum(-1, dtype=np.uint8) << 7
    return book.codes(indices, flags)


def make_artifact(folder: Path, model: LlamaForCausalLM, target: str, tokenizer: Tokenizer | None) -> Artifact:
    """Writes the model as an artifact of `target`. Plain types hold its weights, block types random ones."""
    artifact = Artifact(folder)
    artifact.begin({"recipe": {"source": "some/tiny-llama", "target": target}, "calibration": {"name": "none"}})
    write_json(
        folder / "model/config.json",
        json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": ["LlamaForCausalLM"]},
    )
    if tokenizer is not None:
        tokenizer.save(str(folder / "model/tokenizer.json"))
        write_json(folder / "model/tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
        (folder / "model/chat_template.jinja").write_text("{{ messages }}")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    planned = plan(
        Target.parse(target), artifact.config(), {name: tuple(tensor.shape) for name, tensor in weights.items()}
    )
    for tensor in planned:
        codec = codec_named(tensor.codec_name)
        if hasattr(codec, "encode_values"):
            planes = codec.encode_values(weights[tensor.name].reshape(tensor.matrix))
        else:
            planes = codec.encode(*random_grid(tensor.codec_name, *tensor.matrix))
        artifact.write(StoredTensor(tensor.name, tensor.codec_name, tensor.shape, planes))
    artifact.finish([tensor.name for tensor in planned], {})
    return artifact


def export(folder: Path, model: LlamaForCausalLM, target: str, tokenizer: Tokenizer | None) -> Path:
    """Writes the model as an artifact of `target`, and returns the GGUF file made from it."""
    gguf.write(make_artifact(folder / "artifact", model, target, tokenizer), folder / "model.gguf")
    return folder / "model.gguf"


def reference_logits(model: LlamaForCausalLM, tokens: list[int]) -> np.ndarray:
    """Returns transformers' logits of a sequence, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 500, 60))]
