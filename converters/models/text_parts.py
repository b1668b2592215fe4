"""Models with images or sound whose text part is a model of a known family: their class names, configs and tensors.

The text part alone is quantized. llama.cpp takes the other parts as a file of their own (`--mmproj`).
"""

from __future__ import annotations

from lqexport.converters.models.architecture import Architecture, Config

WITH_TEXT_PARTS = (
    "Gemma4ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "KimiK25ForConditionalGeneration",
    "Kimi_K25ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VipLlavaForConditionalGeneration",
)
"""Class names of models whose text part may be of any family; `model_type` of `text_config` says of which."""
OTHER_TYPES = {"kimi_k2": "deepseek_v3"}
"""`model_type` of published models that transformers does not know -> that of the family that they are of."""
RENAMED = {
    r"^(model\.)?(language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(model\.)?(language_model|text_model)\.(model\.)?": "model.",
}
"""Regular expression -> replacement; together they turn the text part's tensor names into those of its family."""
OTHER_PARTS = (
    r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|mm_projector|connector|audio_tower|embed_(vision|audio))\.|"
    r"^(model\.)?image_newline$"
)
"""A regular expression for the tensors of the other parts."""

SECTIONS = "mrope_section"
"""The key of config.json that says how many pairs of columns the position in time, in height and in width rotates.

transformers has it among the rotary settings, and a config of the text part beside them."""


def is_whole(config: Config) -> bool:
    """Returns whether a config.json is that of a model with a text part and other parts."""
    return any(key in config for key in ("text_config", "vision_config"))


def text_part(config: Config, architecture: Architecture) -> Config:
    """Returns the config of the text part of a model, under the class name of the text part's family.

    Older models have no `text_config`; their text part's keys are beside `vision_config`. `mrope` is a rotation by the
    positions of images. In text it is the same as that of the type `default`. `deepstack_layers` becomes the number of
    the first blocks after which the outputs for images are added again (Qwen3-VL).
    """
    text = config.get("text_config") or {key: value for key, value in config.items() if key != "vision_config"}
    whole = {key: config[key] for key in ("quantization_config",) if key in config}
    outer = {key: config[key] for key in ("tie_word_embeddings",) if config.get(key) is not None}
    vision = config.get("vision_config")
    if isinstance(vision, dict) and isinstance(blocks := vision.get("deepstack_visual_indexes"), list):
        whole["deepstack_layers"] = len(blocks)
    names = {"architectures": [architecture.classes[0]], "model_type": architecture.model_type}
    rope = {key: text[key] for key in ("rope_scaling", "rope_parameters") if text.get(key)}
    for settings in rope.values():
        if SECTIONS in settings:
            whole[SECTIONS] = settings[SECTIONS]
    return text | outer | whole | names | {key: _in_text(settings) for key, settings in rope.items()}


def _in_text(rope: Config) -> Config:
    return {
        key: "default" if value == "mrope" else value for key, value in rope.items() if not key.startswith("mrope_")
    }
