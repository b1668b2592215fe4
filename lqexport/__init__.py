"""Quantize language models inside the exact grid of their target file, export and verify them.

Importing this registers the native format with transformers. The names below are loaded when they are first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lqexport.registration import register

if TYPE_CHECKING:
    from lqexport.loading import LeanQuantModelForCausalLM as LeanQuantModelForCausalLM
    from lqexport.loading import load as load

__version__ = version("lqexport")
EXPORTS = {"LeanQuantModelForCausalLM": "lqexport.loading", "load": "lqexport.loading"}

register()


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"lqexport has no {name!r}.")
    return getattr(import_module(EXPORTS[name]), name)
