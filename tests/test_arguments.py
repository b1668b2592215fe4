"""Wrong values that a script gives are refused before work, by one sentence that names them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lqexport
from lqexport.arguments import taken
from lqexport.cli import evaluate, imatrix, quantize, verify, write_text
from lqexport.cli.shared_options import MeasurementOptions
from lqexport.planning.needs import without_effect
from lqexport.recipe import Recipe


@pytest.mark.parametrize(
    ("given", "annotation", "value"),
    [
        (Path("a"), "str", "a"),
        ("a", "Path | None", Path("a")),
        ("a", "str | Path", "a"),
        (np.int64(3), "int", 3),
        (np.float32(0.5), "float | None", 0.5),
        (3, "float", 3),
        (None, "int | None", None),
        (("a", Path("b")), "Sequence[str]", ["a", "b"]),
        (["a"], "tuple[str, ...]", ("a",)),
        ("mine", "Engine | None", "mine"),
    ],
)
def test_values_get_the_type_that_is_meant(given: Any, annotation: str, value: Any) -> None:
    settled = taken("it", given, annotation)
    assert settled == value
    assert type(settled) is type(value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": "64"}, "samples must be a whole number, not '64'."),
        ({"samples": 2.5}, "samples must be a whole number, not 2.5."),
        ({"samples": True}, "samples must be a whole number, not True."),
        ({"dampening": "x"}, "dampening must be a number, not 'x'."),
        ({"smooth": "no"}, "smooth must be True or False, not 'no'."),
        ({"method": None}, "method cannot be None; choose one of rtn, gptq, lean."),
        ({"types": "*.up_proj.weight=Q6_K"}, "types must be a list, such as ['*.up_proj.weight=Q6_K'], not '*.up"),
        ({"types": [1]}, "each of types must be text, not 1."),
        ({"embedding_type": 4}, "embedding_type must be text, not 4."),
        ({"target": "", "size": 4.25}, "size must be text, not 4.25."),
        ({"target": "exl2", "bits": "3.5"}, "bits must be a number, not '3.5'."),
        ({"calibration": None}, "calibration must be text, not None."),
        ({"source": None}, "source must be text, not None."),
        ({"target": 4}, "target must be text, not 4."),
    ],
)
def test_a_recipe_refuses_wrong_values(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lqexport.UserError) as raised:
        Recipe(**{"source": "model", "target": "gguf:Q4_0"} | options)
    assert str(raised.value).startswith(sentence)
    with pytest.raises(lqexport.UserError):
        dataclasses.replace(Recipe("model", "gguf:Q4_0"), **options)


def test_a_recipe_holds_what_json_can() -> None:
    recipe = Recipe(Path("model"), "gguf:Q4_0", samples=np.int64(8), types=("a=Q6_K",))  # type: ignore[arg-type]
    assert (recipe.source, recipe.types) == ("model", ["a=Q6_K"])
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("options", "names"),
    [({"tune": 8, "asymmetric": True}, "tune, asymmetric"), ({"tune": 8, "rank": 4}, None), ({}, None)],
)
def test_options_without_effect_are_said(options: dict[str, Any], names: str | None) -> None:
    sentence = f"Method rtn reads no calibration text, so {names} will have no effect."
    assert without_effect(Recipe("model", "gguf:Q4_0", method="rtn", **options)) == ([sentence] if names else [])


CALLS: list[tuple[str, Callable[[], Any]]] = [
    ("recipe must be an lqexport.Recipe, not './model'", lambda: lqexport.quantize("./model", "./out")),  # type: ignore[arg-type]
    ("model must be text or an lqexport.Recipe, not 4", lambda: lqexport.export_model(4, "a-Q4_0.gguf")),  # type: ignore[arg-type]
    ("listener must be an lqexport.Listener, such as lqexport.Callback makes",
     lambda: lqexport.write_text("m", "t.jsonl", listener=print)),  # type: ignore[arg-type]
    ("files must be a list, such as ['a.gguf'], not 'a.gguf'", lambda: lqexport.compare("a.gguf", "m")),
    ("texts must be a list, such as ['wikitext2'], not", lambda: lqexport.perplexity("a.gguf", "wikitext2")),
    ("tasks must be a list, such as ['piqa'], not", lambda: lqexport.zero_shot("a.gguf", "piqa")),
    ("types must be a list, such as ['Q4_0'], not", lambda: lqexport.make_ladder("m", "f", "Q4_0")),
    ("protocols must be a list, such as", lambda: lqexport.verify("a", "m", protocols="hf-2048")),  # type: ignore[arg-type]
    ("windows must be a whole number, not '4'", lambda: lqexport.verify("a", "m", windows="4")),  # type: ignore[arg-type]
    ("max_kl must be a number, not '0.05'", lambda: lqexport.verify("a", "m", max_kl="0.05")),  # type: ignore[arg-type]
    ("split_max_size must be text, not 2000", lambda: lqexport.export("a", "m", split_max_size=2000)),  # type: ignore[arg-type]
    ("device must be a whole number, not '24GB'. Memory is given in bytes",
     lambda: lqexport.MemoryLimits("24GB")),  # type: ignore[arg-type]
    ("host must be at least 0, not -1. Memory is given", lambda: lqexport.MemoryLimits(None, -1)),
    ("Name at least one task", lambda: lqexport.zero_shot("a", [])),
    ("Give at least one file to check.", lambda: lqexport.check([])),
    ("Name at least one type, such as", lambda: lqexport.make_ladder("m", "f", [])),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "call"), CALLS, ids=[sentence[:40] for sentence, _ in CALLS])
def test_a_call_refuses_wrong_values(sentence: str, call: Callable[[], Any]) -> None:
    with pytest.raises(lqexport.UserError) as raised:
        call()
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    ("command", "function"),
    [
        (verify.verify, "verify"),
        (verify.compare, "compare"),
        (verify.push_to_hub, "push_to_hub"),
        (evaluate.judge, "judge"),
        (imatrix.imatrix, "make_imatrix"),
        (write_text.write_text, "write_text"),
        (MeasurementOptions, "export_model"),
        (MeasurementOptions, "make_ladder"),
        (quantize.quantize, "quantize"),
    ],
)
def test_python_has_the_defaults_of_the_command_line(command: Callable[..., Any], function: str) -> None:
    options, arguments = (inspect.signature(each).parameters for each in (command, getattr(lqexport, function)))
    shared = [name for name in options if name in arguments and options[name].default is not inspect.Parameter.empty]
    assert shared
    assert {name: options[name].default for name in shared} == {name: arguments[name].default for name in shared}
