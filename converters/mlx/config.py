"""config.json as mlx-lm reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lqexport.converters.mlx.types import in_half, settings
from lqexport.converters.models.architecture import Config
from lqexport.converters.models.rope import former_rope, window_theta
from lqexport.converters.models.tensor_names import is_tied


def mlx_config(config: Config, modules: Mapping[str, str]) -> Config:
    """Returns config.json with the keys that mlx-lm reads, and with `quantization`.

    modules   quantized module, by its path in mlx-lm's model -> its codec

    mlx-lm takes `rope_theta` and `rope_scaling`, which transformers 5 writes as `rope_parameters`. It gives many
    settings other defaults than transformers, so that `tie_word_embeddings` is always written. `quantization` has the
    settings of most modules, and by path those of the others.
    """
    dtype = "float16" if in_half(config) else "bfloat16"
    extended = config | former_rope(config) | {"tie_word_embeddings": is_tied(config)}
    extended |= {"dtype": dtype, "torch_dtype": dtype}
    if (theta := window_theta(config)) is not None:
        extended["rope_local_base_freq"] = theta
    usual = Counter(modules.values()).most_common(1)[0][0]
    apart = {path: settings(codec_name) for path, codec_name in modules.items() if codec_name != usual}
    quantization: dict[str, Any] = settings(usual) | apart
    return extended | {"quantization": quantization, "quantization_config": quantization}
