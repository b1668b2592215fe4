"""Quantizes language models inside the exact grid of their target file, exports and verifies them.

Importing this package registers the native format with transformers. The public names are loaded when they are first
used, so importing is quick. docs/python.md says what they do.
"""

import os
from importlib import import_module
from importlib.metadata import version
from inspect import isfunction
from typing import TYPE_CHECKING, Any

from lqexport.arguments import checked
from lqexport.integration.registration import register

# Equal recipes must give equal bytes. Without this setting, the last bits of MKL's float64 products depend on how their
# operands are aligned in memory. MKL reads it before its first product. No cost in time could be measured.
os.environ.setdefault("MKL_CBWR", "AUTO")

if TYPE_CHECKING:
    from lqexport.calibration.make_imatrix import make_imatrix as make_imatrix
    from lqexport.calibration.model_text import write_text as write_text
    from lqexport.delivery.deliver import Delivery as Delivery
    from lqexport.delivery.deliver import export_model as export_model
    from lqexport.delivery.ladder import Ladder as Ladder
    from lqexport.delivery.ladder import make_ladder as make_ladder
    from lqexport.errors import UserError as UserError
    from lqexport.evaluation.judging import judge as judge
    from lqexport.evaluation.papers import perplexity as perplexity
    from lqexport.evaluation.zero_shot_tasks import zero_shot as zero_shot
    from lqexport.exporting import export as export
    from lqexport.integration.loading import LeanQuantModelForCausalLM as LeanQuantModelForCausalLM
    from lqexport.integration.loading import load as load
    from lqexport.models.inspect import inspect as inspect
    from lqexport.pictures import to_mmproj as to_mmproj
    from lqexport.pipeline.quantize import quantize as quantize
    from lqexport.planning.dryrun import preview as preview
    from lqexport.planning.forecast import forecast as forecast
    from lqexport.planning.memory import MemoryLimits as MemoryLimits
    from lqexport.recipe import Recipe as Recipe
    from lqexport.runtime.progress import Callback as Callback
    from lqexport.runtime.progress import Listener as Listener
    from lqexport.verification.checks import check as check
    from lqexport.verification.comparison import compare as compare
    from lqexport.verification.publish import push_to_hub as push_to_hub
    from lqexport.verification.publish import save_record as save_record
    from lqexport.verification.result import Verification as Verification
    from lqexport.verification.verifying import verify as verify

__version__ = version("lqexport")

_MODULES = {
    "Callback": "runtime.progress",
    "Delivery": "delivery.deliver",
    "Ladder": "delivery.ladder",
    "LeanQuantModelForCausalLM": "integration.loading",
    "Listener": "runtime.progress",
    "MemoryLimits": "planning.memory",
    "Recipe": "recipe",
    "UserError": "errors",
    "Verification": "verification.result",
    "check": "verification.checks",
    "compare": "verification.comparison",
    "export": "exporting",
    "export_model": "delivery.deliver",
    "forecast": "planning.forecast",
    "inspect": "models.inspect",
    "judge": "evaluation.judging",
    "load": "integration.loading",
    "make_imatrix": "calibration.make_imatrix",
    "make_ladder": "delivery.ladder",
    "perplexity": "evaluation.papers",
    "preview": "planning.dryrun",
    "push_to_hub": "verification.publish",
    "quantize": "pipeline.quantize",
    "save_record": "verification.publish",
    "to_mmproj": "pictures",
    "verify": "verification.verifying",
    "write_text": "calibration.model_text",
    "zero_shot": "evaluation.zero_shot_tasks",
}
"""Public names and the modules that have them."""

__all__ = ["__version__", *_MODULES]

register()


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first used. Raises AttributeError for any other name.

    A function is given with a check of its arguments.
    """
    if name not in _MODULES:
        raise AttributeError(f"lqexport has no {name!r}.")
    value = getattr(import_module(f"lqexport.{_MODULES[name]}"), name)
    return checked(value) if isfunction(value) else value


def __dir__() -> list[str]:
    """Returns the public names, for completion in an interactive session."""
    return sorted(__all__)
