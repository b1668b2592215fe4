"""Quantize language models inside the exact grid of their target file, export and verify them.

Importing this registers the native format with transformers. The names below are loaded when they are first used, so
that importing is quick; docs/python.md says what they do.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lqexport.integration.registration import register

# The last bits of MKL's float64 products depend on how their operands are aligned in memory, unless it is told not to
# let them before its first one. Equal recipes must give equal bytes; it costs no time that could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO")

if TYPE_CHECKING:
    from lqexport.errors import UserError as UserError
    from lqexport.evaluation.judging import judge as judge
    from lqexport.evaluation.papers import perplexity as perplexity
    from lqexport.evaluation.zero_shot_tasks import zero_shot as zero_shot
    from lqexport.exporting import export as export
    from lqexport.integration.loading import LeanQuantModelForCausalLM as LeanQuantModelForCausalLM
    from lqexport.integration.loading import load as load
    from lqexport.pipeline.quantize import quantize as quantize
    from lqexport.planning.dryrun import preview as preview
    from lqexport.recipe import Recipe as Recipe
    from lqexport.runtime.progress import Callback as Callback
    from lqexport.runtime.progress import Listener as Listener
    from lqexport.verification.comparison import compare as compare
    from lqexport.verification.publish import push_to_hub as push_to_hub
    from lqexport.verification.publish import save_record as save_record
    from lqexport.verification.result import Verification as Verification
    from lqexport.verification.verifying import verify as verify

__version__ = version("lqexport")

_MODULES = {
    "Callback": "runtime.progress",
    "LeanQuantModelForCausalLM": "integration.loading",
    "Listener": "runtime.progress",
    "Recipe": "recipe",
    "UserError": "errors",
    "Verification": "verification.result",
    "compare": "verification.comparison",
    "export": "exporting",
    "perplexity": "evaluation.papers",
    "zero_shot": "evaluation.zero_shot_tasks",
    "judge": "evaluation.judging",
    "load": "integration.loading",
    "preview": "planning.dryrun",
    "push_to_hub": "verification.publish",
    "quantize": "pipeline.quantize",
    "save_record": "verification.publish",
    "verify": "verification.verifying",
}
__all__ = ["__version__", *_MODULES]

register()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"lqexport has no {name!r}.")
    return getattr(import_module(f"lqexport.{_MODULES[name]}"), name)
