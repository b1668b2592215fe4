"""How a written model is run: commands for a terminal, and lines for a model card."""

from __future__ import annotations

import shlex

LLAMA_CPP = "With [llama.cpp](https://github.com/ggml-org/llama.cpp):"
INSTALL = "https://github.com/lqexport/lqexport"
LIBRARIES = {
    "gguf": "gguf",
    "mlx": "mlx",
    "exl2": "exllamav2",
    "exl3": "exllamav3",
    "gptq": "transformers",
    "native": "transformers",
}
"""Family of a target -> the library that loads it, by the name that the hub has for it."""


def commands(name: str, family: str, adapter: str | None = None, *, encoder: bool = False) -> list[str]:
    """Returns the commands that run a model of a target family.

    name      its file or folder
    adapter   the file or folder of its low-rank corrections, if there are any
    encoder   whether it is an encoder, which gives embeddings and no text
    """
    path = shlex.quote(name)
    if family == "gguf" and encoder:
        return [f"llama-embedding -m {path} -p Hello", f"llama-server -m {path} --embedding"]
    if family == "gguf":
        lora = f" --lora {shlex.quote(adapter)}" if adapter else ""
        return [f"llama-cli -m {path}{lora}", f"llama-server -m {path}{lora}"]
    if family == "gptq":
        lora = f" --enable-lora --lora-modules corrected={shlex.quote(adapter)}" if adapter else ""
        return [f"vllm serve {path}{lora}"]
    if family == "mlx":
        return [f"mlx_lm.chat --model {path}", f"mlx_lm.generate --model {path} --prompt Hello"]
    if family == "exl2":
        return [f"python test_inference.py -m {path} -p Hello  # of exllamav2"]
    if family == "exl3":
        return [f"python examples/chat.py -m {path} -mode raw  # of exllamav3"]
    return [f"python examples/generate.py {path} Hello  # of lqexport"]


def card_lines(name: str, family: str, adapter: str | None = None, *, encoder: bool = False) -> list[str]:
    """Returns the Markdown lines of a card that say how the model is run; the arguments are those of `commands`."""
    block = [f"    {command}" for command in commands(name, family, adapter, encoder=encoder)]
    if family == "gguf" and encoder:
        return [LLAMA_CPP, "", *block]
    if family == "gguf":
        lora = [f"ADAPTER ./{adapter}"] if adapter else []
        modelfile = "; ".join(f"`{line}`" for line in [f"FROM ./{name}", *lora])
        return [
            LLAMA_CPP, "", *block, "",
            f"With Ollama, from a file `Modelfile` with the line{'s' if lora else ''} {modelfile}:", "",
            "    ollama create my-model -f Modelfile", "    ollama run my-model", "",
            f"In LM Studio: `lms import {name}`, or put the file into its folder of models.",
        ]  # fmt: skip
    if family == "gptq":
        return ["With vLLM, or with transformers and GPTQModel:", "", *block]
    if family == "mlx":
        return ["With [mlx-lm](https://github.com/ml-explore/mlx-lm), or in LM Studio:", "", *block]
    if family == "exl2":
        return ["With ExLlamaV2, and what builds on it, such as TabbyAPI:", "", *block]
    if family == "exl3":
        return ["With ExLlamaV3, and what builds on it, such as TabbyAPI and text-generation-webui:", "", *block]
    lines = [f"    import lqexport  # {INSTALL}", f"    model = lqexport.load({name!r}, device_map='auto')"]
    return ["With transformers and lqexport:", "", *lines]
