"""Quantize language models inside the exact grid of their target file, export and verify them.

Importing this registers the native format with transformers. The names below are loaded when they are first used, so
that importing is quick; docs/python.md says what they do.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lqexport.registration import register

# The last bits of MKL's float64 products depend on how their operands are aligned in memory, unless it is told not to
# let them before its first one. Equal recipes must give equal bytes; it costs no time that could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO")

if TYPE_CHECKING:
    from lqexport.comparison import compare as compare
    from lqexport.dryrun import preview as preview
    from lqexport.errors import UserError as UserError
    from lqexport.exporting import export as export
    from lqexport.judging import judge as judge
    from lqexport.loading import LeanQuantModelForCausalLM as LeanQuantModelForCausalLM
    from lqexport.loading import load as load
    from lqexport.papers import perplexity as perplexity
    from lqexport.pipeline import quantize as quantize
    from lqexport.progress import Callback as Callback
    from lqexport.progress import Listener as Listener
    from lqexport.publish import push_to_hub as push_to_hub
    from lqexport.publish import save_record as save_record
    from lqexport.recipe import Recipe as Recipe
    from lqexport.verification import Verification as Verification
    from lqexport.verifying import verify as verify
    from lqexport.zero_shot_tasks import zero_shot as zero_shot

__version__ = version("lqexport")

_MODULES = {
    "Callback": "progress",
    "LeanQuantModelForCausalLM": "loading",
    "Listener": "progress",
    "Recipe": "recipe",
    "UserError": "errors",
    "Verification": "verification",
    "compare": "comparison",
    "export": "exporting",
    "perplexity": "papers",
    "zero_shot": "zero_shot_tasks",
    "judge": "judging",
    "load": "loading",
    "preview": "dryrun",
    "push_to_hub": "publish",
    "quantize": "pipeline",
    "save_record": "publish",
    "verify": "verifying",
}
__all__ = ["__version__", *_MODULES]

register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"lqexport has no {name!r}.")
    return getattr(import_module(f"lqexport.{_MODULES[name]}"), name)
