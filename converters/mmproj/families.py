"""The table of families whose image part is written for llama.cpp."""

from __future__ import annotations

from typing import Any

import numpy as np

from lqexport.converters.gguf.row_order import rope_order
from lqexport.converters.mmproj.vision import Take, Values, Vision, blocks
from lqexport.converters.models.architecture import Config

SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
}
QWEN_SIZES = {key: SIZES[key] for key in ("patch_size", "embedding_length", "feed_forward_length")}
QWEN_SIZES |= {"block_count": "depth", "attention.head_count": "num_heads"}
QWEN_FIXED = {"temporal_patch_size": (2,), "spatial_merge_size": (2,), "in_channels": (3,)}
QWEN_EPSILON = 1e-6  # transformers has it in its code


def _third(number: int) -> Take:
    """Returns a function that takes queries, keys or values of a fused tensor."""
    return lambda values, vision: np.split(values, 3)[number]


def _frame(number: int) -> Take:
    """Returns a function that takes one of the two frames of weights [rows, colours, frames, height, width]."""
    return lambda values, vision: values[:, :, number]


QWEN_PATCHES: dict[str, tuple[tuple[str, Take], ...]] = {
    "visual.patch_embed.proj.weight": (("v.patch_embd.weight", _frame(0)), ("v.patch_embd.weight.1", _frame(1))),
}
QKV_PARTS = {
    f"visual.blocks.*.attn.qkv.{end}": tuple(
        (f"v.blk.*.attn_{letter}.{end}", _third(number)) for number, letter in enumerate("qkv")
    )
    for end in ("weight", "bias")
}


def _siglip(prefix: str) -> dict[str, str]:
    """Returns the modules of SigLIP, with the prefix of their names in a checkpoint."""
    of_blocks = {
        "layer_norm1": "ln1",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    }
    return blocks(f"{prefix}.encoder.layers", of_blocks) | {
        f"{prefix}.embeddings.patch_embedding": "v.patch_embd",
        f"{prefix}.embeddings.position_embedding": "v.position_embd",
        f"{prefix}.post_layernorm": "v.post_ln",
    }


def _pooled(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    """Returns by how much the pooling of Gemma 3 shrinks each side of an image, where llama.cpp would take another."""
    side = vision["image_size"] // vision["patch_size"]
    factor = side // round(whole["mm_tokens_per_image"] ** 0.5)
    epsilon = {"vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"])}
    return epsilon | ({} if factor == 4 else {"vision.projector.scale_factor": factor})


GEMMA3 = Vision(
    family="Gemma 3",
    classes=("Gemma3ForConditionalGeneration",),
    model_types=("siglip_vision_model",),
    projector="gemma3",
    sizes=SIZES,
    modules=_siglip("vision_tower")
    | {
        "multi_modal_projector.mm_soft_emb_norm": "mm.soft_emb_norm",
    },
    tensors={"multi_modal_projector.mm_input_projection_weight": "mm.input_projection.weight"},
    plus_one=("mm.soft_emb_norm.weight",),
    transposed=("mm.input_projection.weight",),
    left_out=(r"^vision_tower\.head\.",),
    further=_pooled,
)


def _shuffled(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    """Returns by how much Idefics 3 shrinks each side of an image, and to what size it scales an image at first."""
    longest = (processor.get("size") or {}).get("longest_edge") or vision["image_size"]
    return {
        "vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"]),
        "vision.projector.scale_factor": whole["scale_factor"],
        "vision.preproc_image_size": longest,
    }


IDEFICS3 = Vision(
    family="Idefics 3, SmolVLM",
    classes=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    model_types=("idefics3", "idefics3_vision", "smolvlm_vision"),
    projector="idefics3",
    sizes=SIZES,
    modules=_siglip("vision_model") | {"connector.modality_projection.proj": "mm.model.fc"},
    further=_shuffled,
)


def _internvl(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    return {
        "vision.image_size": vision["image_size"][0],
        "vision.patch_size": vision["patch_size"][0],
        "vision.attention.layer_norm_epsilon": float(vision["layer_norm_eps"]),
        "vision.projector.scale_factor": round(1 / whole["downsample_ratio"]),
    }


def _row(values: Values, vision: Config) -> Values:
    return values.reshape(-1)


def _class_last(values: Values, vision: Config) -> Values:
    """Returns positions [1, positions, columns] as a matrix, that of the class token last, where llama.cpp puts it."""
    return np.roll(values[0], -1, axis=0)


INTERNVL = Vision(
    family="InternVL",
    classes=("InternVLForConditionalGeneration",),
    model_types=("internvl_vision",),
    projector="internvl",
    sizes=SIZES,
    modules=blocks(
        "vision_tower.encoder.layer",
        {
            "layernorm_before": "ln1",
            "attention.q_proj": "attn_q",
            "attention.k_proj": "attn_k",
            "attention.v_proj": "attn_v",
            "attention.projection_layer": "attn_out",
            "layernorm_after": "ln2",
            "mlp.fc1": "ffn_up",
            "mlp.fc2": "ffn_down",
        },
    )
    | {
        "vision_tower.embeddings.patch_embeddings.projection": "v.patch_embd",
        "multi_modal_projector.layer_norm": "mm.model.mlp.0",
        "multi_modal_projector.linear_1": "mm.model.mlp.1",
        "multi_modal_projector.linear_2": "mm.model.mlp.3",
    },
    parts={
        "vision_tower.embeddings.cls_token": (("v.class_embd", _row),),
        "vision_tower.embeddings.position_embeddings": (("v.position_embd.weight", _class_last),),
        "vision_tower.encoder.layer.*.lambda_1": (("v.blk.*.ls1.weight", _row),),
        "vision_tower.encoder.layer.*.lambda_2": (("v.blk.*.ls2.weight", _row),),
    },
    left_out=(r"^vision_tower\.embeddings\.mask_token$",),
    activations=("gelu", "gelu_pytorch_tanh"),
    fixed={"use_qk_norm": (False,), "norm_type": ("layer_norm",), "use_mean_pooling": (True,)},
    whole_fixed={
        "projector_hidden_act": ("gelu",),
        "vision_feature_layer": (-1, [-1]),
        "vision_feature_select_strategy": ("default",),
    },
    further=_internvl,
)


def _rotated(values: Values, vision: Config) -> Values:
    """Returns rows with the halves of each head interleaved, as llama.cpp rotates them."""
    return values[rope_order(len(values), vision["num_attention_heads"])]


def _pixtral(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    merged = {"vision.spatial_merge_size": whole["spatial_merge_size"]} if "spatial_merge_size" in whole else {}
    return {"vision.attention.layer_norm_epsilon": 1e-5} | merged  # transformers has it in its code


def _pixtral_differs(vision: Config) -> str:
    rope = vision.get("rope_parameters") or vision
    if float(rope.get("rope_theta") or 1e4) != 1e4:
        return f"llama.cpp rotates with rope_theta 10000, and vision_config has {rope['rope_theta']}"
    return _wide_heads(vision)


def _wide_heads(vision: Config) -> str:
    heads, hidden = vision["num_attention_heads"], vision["hidden_size"]
    if (vision.get("head_dim") or hidden // heads) * heads != hidden:
        return f"llama.cpp wants heads that add up to hidden_size {hidden}, and vision_config has head_dim otherwise"
    if vision.get("num_key_value_heads", heads) != heads:
        return "llama.cpp wants as many key heads as query heads"
    return ""


PIXTRAL = Vision(
    family="Pixtral",
    classes=("LlavaForConditionalGeneration",),
    model_types=("pixtral",),
    projector="pixtral",
    sizes=SIZES,
    modules=blocks(
        "vision_tower.transformer.layers",
        {
            "attention_norm": "ln1",
            "attention.q_proj": "attn_q",
            "attention.k_proj": "attn_k",
            "attention.v_proj": "attn_v",
            "attention.o_proj": "attn_out",
            "ffn_norm": "ln2",
            "feed_forward.gate_proj": "ffn_gate",
            "feed_forward.up_proj": "ffn_up",
            "feed_forward.down_proj": "ffn_down",
        },
    )
    | {
        "vision_tower.patch_conv": "v.patch_embd",
        "vision_tower.ln_pre": "v.pre_ln",
        "multi_modal_projector.linear_1": "mm.1",
        "multi_modal_projector.linear_2": "mm.2",
    },
    taken={"v.blk.*.attn_q": _rotated, "v.blk.*.attn_k": _rotated},
    activations=("silu", "gelu", "gelu_pytorch_tanh"),
    whole_fixed={
        "projector_hidden_act": ("gelu",),
        "vision_feature_layer": (-1, [-1]),
        "vision_feature_select_strategy": ("full",),
    },
    further=_pixtral,
    break_token="[IMG_BREAK]",
    checks=_pixtral_differs,
)

MISTRAL3 = Vision(
    **vars(PIXTRAL)
    | {
        "family": "Mistral Small 3.1 and later, Ministral 3",
        "classes": ("Mistral3ForConditionalGeneration",),
        "whole_fixed": {key: PIXTRAL.whole_fixed[key] for key in ("projector_hidden_act", "vision_feature_layer")},
        "modules": PIXTRAL.modules
        | {
            "multi_modal_projector.norm": "mm.input_norm",
            "multi_modal_projector.patch_merger.merging_layer": "mm.patch_merger",
        },
    }
)


def _qwen2(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    """Returns the settings of Qwen2-VL and Qwen2.5-VL. The image size is that of llama.cpp's converter, unused."""
    sizes = {"vision.image_size": 560, "vision.attention.layer_norm_epsilon": QWEN_EPSILON}
    if "embed_dim" in vision:
        return sizes | {
            "vision.embedding_length": vision["embed_dim"],
            "vision.feed_forward_length": int(vision["embed_dim"] * vision["mlp_ratio"]),
        }
    full = vision["fullatt_block_indexes"]
    return sizes | {"vision.n_wa_pattern": full[0] + 1 if full else 0}


def _windows_differ(vision: Config) -> str:
    full, count = vision["fullatt_block_indexes"], vision["depth"]
    if full and full != list(range(full[0], count, full[0] + 1)):
        return f"llama.cpp wants every n-th block to see the whole image, and fullatt_block_indexes is {full}"
    return ""


QWEN2_VL = Vision(
    family="Qwen2-VL",
    classes=("Qwen2VLForConditionalGeneration",),
    model_types=("qwen2_vl", "qwen2_vl_vision"),
    projector="qwen2vl_merger",
    sizes={key: QWEN_SIZES[key] for key in ("patch_size", "block_count", "attention.head_count")},
    modules=blocks(
        "visual.blocks",
        {"norm1": "ln1", "attn.proj": "attn_out", "norm2": "ln2", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    )
    | {"visual.merger.ln_q": "v.post_ln", "visual.merger.mlp.0": "mm.0", "visual.merger.mlp.2": "mm.2"},
    parts=QWEN_PATCHES | QKV_PARTS,
    activations=("quick_gelu",),
    fixed=QWEN_FIXED,
    further=_qwen2,
)

QWEN2_5_VL = Vision(
    **vars(QWEN2_VL)
    | {
        "family": "Qwen2.5-VL",
        "classes": ("Qwen2_5_VLForConditionalGeneration",),
        "model_types": ("qwen2_5_vl", "qwen2_5_vl_vision"),
        "projector": "qwen2.5vl_merger",
        "sizes": QWEN_SIZES,
        "modules": {module: gguf for module, gguf in QWEN2_VL.modules.items() if ".mlp.fc" not in module}
        | blocks(
            "visual.blocks",
            {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
        ),
        "activations": ("silu",),
        "fixed": QWEN_FIXED | {"window_size": (112,)},
        "checks": _windows_differ,
    }
)


def _qwen3(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    side = round(vision["num_position_embeddings"] ** 0.5)
    deep = [number in (vision.get("deepstack_visual_indexes") or ()) for number in range(vision["depth"])]
    return {
        "vision.image_size": side * vision["patch_size"],
        "vision.attention.layer_norm_epsilon": QWEN_EPSILON,
        "vision.spatial_merge_size": vision["spatial_merge_size"],
        "vision.is_deepstack_layers": deep,
    }


QWEN3_VL = Vision(
    family="Qwen3-VL, Qwen3.5",
    classes=(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    ),
    model_types=(
        "qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_vl_moe_vision", "qwen3_5", "qwen3_5_vision",
        "qwen3_5_moe", "qwen3_5_moe_vision",
    ),
    projector="qwen3vl_merger",
    sizes=QWEN_SIZES,
    modules=blocks(
        "visual.blocks",
        {
            "norm1": "ln1",
            "attn.qkv": "attn_qkv",
            "attn.proj": "attn_out",
            "norm2": "ln2",
            "mlp.linear_fc1": "ffn_up",
            "mlp.linear_fc2": "ffn_down",
        },
    )
    | {
        "visual.patch_embed.proj": "v.patch_embd",
        "visual.pos_embed": "v.position_embd",
        "visual.deepstack_merger_list.*.norm": "v.deepstack.*.norm",
        "visual.deepstack_merger_list.*.linear_fc1": "v.deepstack.*.fc1",
        "visual.deepstack_merger_list.*.linear_fc2": "v.deepstack.*.fc2",
        "visual.merger.norm": "v.post_ln",
        "visual.merger.linear_fc1": "mm.0",
        "visual.merger.linear_fc2": "mm.2",
    },
    parts=QWEN_PATCHES,
    numbered={"visual.deepstack_merger_list": "deepstack_visual_indexes"},
    fixed=QWEN_FIXED,
    further=_qwen3,
)  # fmt: skip


def _gemma4(vision: Config, whole: Config, processor: Config) -> dict[str, Any]:
    return {
        "vision.image_size": 224,  # unused, and llama.cpp wants one
        "vision.attention.layer_norm_epsilon": float(vision["rms_norm_eps"]),
        "vision.projector.scale_factor": vision["pooling_kernel_size"],
    }


def _gemma4_differs(vision: Config) -> str:
    if (theta := float((vision.get("rope_parameters") or {}).get("rope_theta") or 100)) != 100:
        return f"llama.cpp rotates with rope_theta 100, and vision_config has {theta:g}"
    return _wide_heads(vision)


def _patches(values: Values, vision: Config) -> Values:
    """Returns a matrix over the pixels of a patch as weights [rows, colours, height, width]."""
    size = vision["patch_size"]
    return values.reshape(len(values), size, size, 3).transpose(0, 3, 1, 2)


GEMMA4_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA4 = Vision(
    family="Gemma 4",
    classes=("Gemma4ForConditionalGeneration",),
    model_types=("gemma4_vision",),
    projector="gemma4v",
    projector_key="vision.projector_type",
    sizes={key: name for key, name in SIZES.items() if key != "image_size"},
    modules=blocks(
        "vision_tower.encoder.layers",
        GEMMA4_LINEARS  # the bounds of their inputs and outputs
        | {f"{linear}.linear": gguf for linear, gguf in GEMMA4_LINEARS.items()}
        | {
            "input_layernorm": "ln1",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "post_attention_layernorm": "attn_post_norm",
            "pre_feedforward_layernorm": "ln2",
            "post_feedforward_layernorm": "ffn_post_norm",
        },
    )
    | {
        "vision_tower.patch_embedder.input_proj": "v.patch_embd",
        "embed_vision.embedding_projection": "mm.input_projection",
    },
    tensors={
        "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
        "vision_tower.std_bias": "v.std_bias",
        "vision_tower.std_scale": "v.std_scale",
    },
    taken={"v.patch_embd": _patches},
    left_out=(r"^(audio_tower|embed_audio)\.",),
    activation="hidden_activation",
    further=_gemma4,
    checks=_gemma4_differs,
)

FAMILIES = (GEMMA3, GEMMA4, IDEFICS3, INTERNVL, PIXTRAL, MISTRAL3, QWEN2_VL, QWEN2_5_VL, QWEN3_VL)

REFUSED = {
    "clip_vision_model": "llama.cpp puts the class token of CLIP after the patches of an image, and takes the outputs "
    "as if it were before them",
}
"""`model_type` of the `vision_config` of parts that llama.cpp computes otherwise than transformers -> how."""
