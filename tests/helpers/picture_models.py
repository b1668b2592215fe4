"""Small random models with images, and what their image parts make of an image, by transformers and by llama.cpp."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from family_cases import make_tokenizer
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lqexport.evaluation import llamacpp

MEAN, DEVIATION = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
TEXT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
TEXT |= {"pad_token_id": 0}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
WIDTHS: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
LAYERS: dict[str, Any] = WIDTHS | {"num_hidden_layers": 2, "num_attention_heads": 2}
QWEN: dict[str, Any] = WIDTHS | {"depth": 3, "num_heads": 2, "out_hidden_size": 64}
PIXTRAL = LAYERS | {"model_type": "pixtral", "head_dim": 32, "image_size": 112, "patch_size": 14}
GEMMA3_BLOCKS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
DELTA_NET = {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 32}
DELTA_NET |= {"linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
DELTA_NET |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [3, 3, 2],
                                  "partial_rotary_factor": 0.5}}  # fmt: skip
GEMMA4_TEXT = {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}
GEMMA4_TEXT |= {"global_head_dim": 32, "vocab_size_per_layer_input": 512}
DEEP = {"patch_size": 16, "num_position_embeddings": 64}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], tuple[int, int]]] = {
    "gemma3": (
        "Gemma3", TEXT | GEMMA3_BLOCKS | {"query_pre_attn_scalar": 16},
        {"model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
         "num_attention_heads": 3, "image_size": 64, "patch_size": 4},
        {"mm_tokens_per_image": 64}, (64, 64),
    ),
    "gemma4": (
        "Gemma4", TEXT | GEMMA4_TEXT,
        LAYERS | {"num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "position_embedding_size": 64,
                  "use_clipped_linears": True},
        {"audio_config": None}, (192, 192),
    ),
    "smolvlm": (
        "SmolVLM", TEXT | {"model_type": "llama"}, LAYERS | {"image_size": 64, "patch_size": 8}, {"scale_factor": 2},
        (64, 64),
    ),
    "idefics3": (
        "Idefics3", TEXT | {"model_type": "llama"}, LAYERS | {"image_size": 64, "patch_size": 4}, {"scale_factor": 4},
        (64, 64),
    ),
    "internvl": (
        "InternVL", TEXT | {"model_type": "qwen2"}, LAYERS | {"image_size": [56, 56], "patch_size": [14, 14]}, {},
        (56, 56),
    ),
    "pixtral": (
        "Llava", TEXT | {"model_type": "mistral"}, PIXTRAL,
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, (112, 84),
    ),
    "mistral3": (
        "Mistral3", TEXT | {"model_type": "mistral"}, PIXTRAL | {"hidden_act": "silu"}, {"spatial_merge_size": 2},
        (112, 84),
    ),
    "qwen2_vl": ("Qwen2VL", TEXT | MROPE, {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 64,
                                           "mlp_ratio": 2, "patch_size": 14}, {}, (112, 84)),
    "qwen2_5_vl": ("Qwen2_5_VL", TEXT | MROPE, QWEN | {"patch_size": 14, "fullatt_block_indexes": [2]}, {}, (280, 196)),
    "qwen3_vl": ("Qwen3VL", TEXT | MROPE, QWEN | DEEP | {"deepstack_visual_indexes": [0, 2]}, {}, (192, 96)),
    "qwen3_5": ("Qwen3_5", TEXT | DELTA_NET, QWEN | DEEP, {}, (128, 128)),
}  # fmt: skip
"""Case -> transformers' name, `text_config`, `vision_config`, the rest of config.json, and the size of an image."""


def make_model(name: str) -> PreTrainedModel:
    """Returns a model whose image part has random weights that are neither small nor ones nor zeros."""
    prefix, text, vision, rest, _ = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision, **rest)
    model: PreTrainedModel = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
    draw = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if not re.search("language_model|text_model|lm_head", key):
            parameter.data = _drawn(key, torch.randn(parameter.shape, generator=draw))
    for key, buffer in model.named_buffers():  # the bounds of Gemma 4's linears
        if key.endswith(("_min", "_max")):
            buffer.fill_(-1.5 if key.endswith("_min") else 1.5)
    return model


def _drawn(key: str, values: Tensor) -> Tensor:
    if values.ndim == 1:
        is_norm = key.endswith("weight") and "soft_emb" not in key
        return float(is_norm) + 0.2 * values
    return values / (len(values) if "mm_input" in key else values[0].numel()) ** 0.5


def save(name: str, folder: Path) -> Path:
    """Writes a case as a folder `hf` with tokenizer and preprocessor_config.json. Returns that."""
    make_model(name).save_pretrained(folder / "hf")
    tokenizer = make_tokenizer("gpt-2", folder)
    tokenizer.add_tokens(["[IMG_BREAK]"])
    tokenizer.save_pretrained(folder / "hf")
    mean, deviation = ([0.0] * 3, [1.0] * 3) if name == "gemma4" else (MEAN, DEVIATION)
    content = json.dumps({"image_mean": mean, "image_std": deviation})
    (folder / "hf" / "preprocessor_config.json").write_text(content)
    return folder / "hf"


def image(name: str) -> NDArray[np.uint8]:
    """Returns a random image [height, width, 3] of the width and height in CASES, which neither program scales."""
    width, height = CASES[name][4]
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@torch.no_grad()
def by_transformers(name: str, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns what transformers' image part makes of an image, [tokens, columns], without the ends of rows."""
    model: Any = make_model(name).model
    mean, deviation = (0.0, 1.0) if name == "gemma4" else (torch.tensor(MEAN), torch.tensor(DEVIATION))
    values = ((torch.from_numpy(pixels).float() / 255 - mean) / deviation).permute(2, 0, 1)
    height, width = pixels.shape[:2]
    if name in ("pixtral", "mistral3"):
        output = model.get_image_features(values[None], image_sizes=torch.tensor([[height, width]]))
    elif name.startswith("qwen"):
        patches, grid = _in_blocks(values, model.visual.config.patch_size)
        output = model.get_image_features(patches, grid)
    elif name == "gemma4":
        output = model.get_image_features(*_with_places(values, model.config.vision_config.patch_size))
    else:
        output = model.get_image_features(values[None, None] if name in ("smolvlm", "idefics3") else values[None])
    deep = [_only(each) for each in getattr(output, "deepstack_features", None) or ()]
    return torch.cat([_only(output.pooler_output), *deep], dim=-1).flatten(0, -2).numpy()


def _only(values: Any) -> Tensor:
    """Returns the tensor of the one image."""
    while not isinstance(values, Tensor):
        (values,) = values
    return values


def _in_blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns an image as Qwen's patches, both frames alike, in blocks of 2 x 2; and its number of patches each way."""
    rows, columns = values.shape[1] // size, values.shape[2] // size
    frames = values.repeat(2, 1, 1, 1).reshape(2, 3, rows // 2, 2, size, columns // 2, 2, size)
    return frames.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])


def _with_places(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns an image as Gemma 4's patches [1, patches, pixels], and the column and row of each."""
    rows, columns = values.shape[1] // size, values.shape[2] // size
    patches = values.reshape(3, rows, size, columns, size).permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
    places = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    return patches, torch.stack(places, -1).reshape(1, -1, 2)


_Parameters = llamacpp.structure(
    "mtmd_context_params",
    """c_bool use_gpu
    c_void_p device
    c_bool print_timings
    c_int32 n_threads
    c_char_p image_marker media_marker
    c_int32 flash_attn_type
    c_bool warmup
    c_int32 image_min_tokens image_max_tokens
    c_void_p cb_eval cb_eval_user_data
    c_int32 batch_max_tokens
    c_void_p progress_callback progress_callback_user_data""",
)
_Text = llamacpp.structure(
    "mtmd_input_text",
    """c_char_p text
    c_size_t text_len
    c_bool add_special parse_special""",
)
_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (_Parameters, []),
    "mtmd_init_from_file": (_Pointer, [ctypes.c_char_p, _Pointer, _Parameters]),
    "mtmd_bitmap_init": (_Pointer, [ctypes.c_uint32, ctypes.c_uint32, _Pointer]),
    "mtmd_input_chunks_init": (_Pointer, []),
    "mtmd_tokenize": (_Int, [_Pointer, _Pointer, ctypes.POINTER(_Text), ctypes.POINTER(_Pointer), _Size]),
    "mtmd_input_chunks_size": (_Size, [_Pointer]),
    "mtmd_input_chunks_get": (_Pointer, [_Pointer, _Size]),
    "mtmd_input_chunk_get_type": (_Int, [_Pointer]),
    "mtmd_input_chunk_get_n_tokens": (_Size, [_Pointer]),
    "mtmd_encode_chunk": (_Int, [_Pointer, _Pointer]),
    "mtmd_get_output_embd": (ctypes.POINTER(ctypes.c_float), [_Pointer]),
    "mtmd_log_set": (None, [_Pointer, _Pointer]),
}
_IMAGE = 1  # mtmd_input_chunk_type
_silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def by_llamacpp(file: Path, text: Path, columns: int, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Returns what llama.cpp makes of an image with the image part in `file`, [tokens, columns].

    There is one result for each part that it looks at: for Idefics 3 a tile and the whole image, which are the same
    here.

    text      a GGUF file of a model that takes inputs of that many columns
    """
    llamacpp.library()
    mtmd = ctypes.CDLL(str(llamacpp._folder() / "lib" / "libmtmd.so.0"))
    for name, (result, arguments) in _FUNCTIONS.items():
        getattr(mtmd, name).restype, getattr(mtmd, name).argtypes = result, arguments
    parameters = mtmd.mtmd_context_params_default()
    assert (parameters.n_threads, parameters.media_marker, parameters.image_max_tokens) == (4, b"<__media__>", -1)
    parameters.use_gpu, parameters.warmup, parameters.n_threads, parameters.flash_attn_type = False, False, 1, 0
    mtmd.mtmd_log_set(_silent, None)
    with llamacpp.LlamaCpp(text, 64, threads=1) as engine:
        context = mtmd.mtmd_init_from_file(str(file).encode(), engine._model, parameters)
        assert context, "llama.cpp does not load the image part"
        height, width = pixels.shape[:2]
        bitmap, chunks = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data), mtmd.mtmd_input_chunks_init()
        prompt = _Text(text=b"<__media__>", text_len=11, parse_special=True)
        assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), (_Pointer * 1)(bitmap), 1) == 0
        every = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        results = []
        for chunk in [each for each in every if mtmd.mtmd_input_chunk_get_type(each) == _IMAGE]:
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), columns)
            results.append(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), shape).copy())
        mtmd.mtmd_bitmap_free(_Pointer(bitmap))
        mtmd.mtmd_input_chunks_free(_Pointer(chunks))
        mtmd.mtmd_free(_Pointer(context))
    return results
