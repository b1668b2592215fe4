"""Small random models with chat templates of the common forms, and GGUF files of them, right and spoiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from family_cases import make_tokenizer
from llama_files import byte_level_bpe, make_model
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from verified_models import make_artifact

from lqexport.converters.gguf.writer import write
from lqexport.storage.artifact import Artifact
from lqexport.storage.files import write_json

CHATML = (
    "{%- if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "You may call these:{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<result>{{ m.content }}</result><|im_end|>\n"
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}{% endif %}"
)
"""Turns between two tokens, tools in the system prompt, and a switch for thinking, which llama.cpp sets."""
LLAMA3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "<|head|>system<|/head|>\n\nToday: {{ date_string }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot|>"
    "{%- for m in messages %}{% if m.role != 'system' %}<|head|>{{ m.role }}<|/head|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
"""A BOS, a date, which llama.cpp sets, and content without white space at its ends."""
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    "{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{%- if add_generation_prompt %}<turn>model\n{% endif %}"
)
"""It refuses system prompts and tools."""
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{%- for m in turns %}{% if m.role == 'user' %}"
    "{% if tools is defined and tools is not none and loop.last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "[INST]{% if loop.first and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}[CALLS]"
    "{% for call in m.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}{% endfor %}"
    "{{ eos_token }}{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""A SentencePiece model, the system prompt in the first turn, tools before the last, and EOS behind answers."""

FORMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": (LLAMA3, ("<|head|>", "<|/head|>", "<|eot|>"), "<|eot|>"),
    "gemma": (GEMMA, ("<turn>", "<end>"), "</s>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALLS]", "[RESULT]", "[/RESULT]"), "</s>"),
}
"""Name -> template, its special tokens, and the tokenizer's EOS."""


def talking_tokenizer(name: str, pieces: Path) -> PreTrainedTokenizerBase:
    """Returns a tokenizer with the special tokens and the chat template of a form."""
    template, special, eos = FORMS[name]
    if name == "mistral":
        fast = make_tokenizer("pieces", pieces)
    else:
        tokenizer: Tokenizer = byte_level_bpe(bos=name != "chatml")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_tokens([AddedToken(text, normalized=False, special=True) for text in special], special_tokens=True)
    fast.eos_token, fast.chat_template = eos, template
    return fast


def talking_source(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Writes a random Llama with a tokenizer as a Hugging Face folder. Its stop tokens are EOS, <end> and </s>."""
    make_model(max_position_embeddings=512).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(text) for text in ("<end>", "</s>") if text in tokenizer.get_vocab()]
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return folder


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory, pieces: Path) -> dict[str, tuple[Path, Artifact, Path]]:
    """Name of a form -> source folder, finished artifact of F16, GGUF file."""
    made = {}
    for name in FORMS:
        folder = tmp_path_factory.mktemp(name)
        source = talking_source(folder / "source", talking_tokenizer(name, pieces))
        artifact = make_artifact(source, folder / "artifact", "gguf:F16")
        write(artifact, folder / "model.gguf")
        made[name] = (source, artifact, folder / "model.gguf")
    return made


def exported_anew(artifact: Artifact, folder: Path, **files: object) -> Path:
    """Returns a GGUF file of the artifact with other small files, given as `name_with_underscores=content`.

    A text becomes chat_template.jinja's content; a dictionary changes the JSON file's; None deletes the file.
    """
    import json

    copy = Artifact(folder / "artifact")
    shutil.copytree(artifact.folder, copy.folder)
    for key, content in files.items():
        path = copy.model_folder / (f"{key}.jinja" if key == "chat_template" else f"{key}.json")
        if content is None:
            path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:
            write_json(path, json.loads(path.read_text()) | content)  # type: ignore[operator]
    write(copy, folder / "model.gguf")
    return folder / "model.gguf"
