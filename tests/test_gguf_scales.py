"""The further scale that llama.cpp has for a whole matrix (`X.scale`), beside NVFP4: solved, written, read, applied."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from family_cases import CASES, architecture_of_case, config_and_shapes, randomized
from family_cases import pieces as pieces
from gguf import GGMLQuantizationType
from llama_files import tokenizer as tokenizer
from rewritten_files import Content, content_of, rewritten
from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from lqexport.checking.checking import check_file
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.scales import APPLIED, with_scales
from lqexport.converters.gguf.writer import write
from lqexport.converters.plan import PlannedTensor
from lqexport.converters.targets import plan
from lqexport.evaluation.llamacpp import LlamaCpp
from lqexport.formats.codec import WHOLE
from lqexport.formats.gguf import E2M1
from lqexport.formats.moves import FloatGrid, move
from lqexport.formats.registry import codec_named
from lqexport.grids.rounding import rounded_like
from lqexport.models.blocks import BlockModel
from lqexport.models.source import open_source
from lqexport.pipeline.quantize import quantize
from lqexport.planning.recipe_plan import plan_recipe
from lqexport.recipe import Recipe
from lqexport.runtime.placement import all_on_device
from lqexport.runtime.tiles import ROW_TILE
from lqexport.solver.linear import solve_linear
from lqexport.solver.rounded_tensor import round_tensor
from lqexport.storage.artifact import Artifact, decoded
from lqexport.target import Target

PLAIN, SCALED = "gguf:NVFP4", "gguf-scaled:NVFP4"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
TOKENS = [1, *(int(token) for token in np.random.default_rng(0).integers(3, 480, 20))]


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Weights of the size that those of large models have."""
    return 0.01 * torch.randn(24, 128, generator=torch.Generator().manual_seed(0))


def test_small_weights_lose_less(weight: torch.Tensor) -> None:
    """The scales of groups of small weights have all their bits."""
    inputs = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    hessian, settings = inputs.T @ inputs / 512, Recipe("source", PLAIN).solver_settings
    plain, scaled = (solve_linear("w", weight, hessian, name, settings) for name in (PLAIN, SCALED))
    assert scaled.facts["loss"] < 0.85 * plain.facts["loss"]
    whole = float(scaled.planes[WHOLE].item())
    assert np.frexp(whole)[0] == 0.5
    assert 56 <= codec_named(SCALED).unpack(scaled.planes, 128)[0].scale.supers.max() <= 224
    larger = solve_linear("w", 2.0**5 * weight, hessian, SCALED, settings)
    assert np.array_equal(larger.planes["blocks"], scaled.planes["blocks"])
    assert float(larger.planes[WHOLE].item()) == 2.0**5 * whole


def test_runs_of_rows_share_it() -> None:
    """The largest weight is in the last run of rows."""
    weight, settings = torch.full((ROW_TILE + 1, 64), 0.01), Recipe("source", PLAIN, method="rtn").solver_settings
    weight[-1] = 1
    placement = replace(all_on_device(weight.device), rows=ROW_TILE)
    solved = solve_linear("w", weight, None, SCALED, settings, placement)
    assert solved.planes[WHOLE].tolist() == [[2.0**-10]]
    np.testing.assert_allclose(decoded(solved), weight, rtol=2**-4)


def test_rounding_knows_the_scale(weight: torch.Tensor) -> None:
    """`verify` rounds a matrix for comparison with the right scale, also where the file has none."""
    stored = round_tensor("w", weight, SCALED)
    for wrong in (1, 0):
        planes = stored.planes | {WHOLE: wrong * stored.planes[WHOLE]}
        assert np.array_equal(rounded_like(SCALED, planes, weight).numpy(), decoded(stored))


def test_zeros(weight: torch.Tensor) -> None:
    stored = round_tensor("w", 0 * weight, SCALED)
    assert float(stored.planes[WHOLE].item()) == 1
    assert not decoded(stored).any()


def test_what_moves() -> None:
    """Any float32 moves to a type with a scale for the matrix, and to one without if the other scales can take it."""
    scale = np.ldexp(np.random.default_rng(0).integers(8, 15, (4, 8)).astype(np.float32), -3)
    codes = np.random.default_rng(1).integers(0, 16, (4, 128)).astype(np.uint8)
    for whole, target in ((0.3, SCALED), (2.0**-3, SCALED), (2.0**-3, PLAIN)):
        grid, codec = FloatGrid(E2M1, scale, np.arange(128) // 16, float(np.float32(whole))), codec_named(target)
        moved = move(grid, codec)
        values = codec.decode(codec.encode(moved.grid, moved.codes(codes)), 128)
        assert np.array_equal(values, grid.values(codes))
    for whole, reason in ((float(np.float32(0.3)), "the type has none"), (np.inf, "is not finite")):
        with pytest.raises(ValueError, match=reason):
            move(FloatGrid(E2M1, scale, np.arange(128) // 16, whole), codec_named(PLAIN))


def scaled_matrices(planned: list[PlannedTensor]) -> set[str]:
    return {re.sub(r"\.\d+\.", ".", tensor.name) for tensor in planned if tensor.codec_name == SCALED}


def test_only_matrices_that_llamacpp_multiplies_have_one() -> None:
    """Qwen2's MLP is none of them, and an MLP's matrix with a bias is not."""
    config, shapes = config_and_shapes("qwen2")
    shapes = {name: (*shape[:-1], 128) if "down_proj" in name else shape for name, shape in shapes.items()}
    architecture = architecture_of_case("qwen2")
    planned = with_scales(architecture, 2, plan(Target.parse(PLAIN), config, shapes))
    assert scaled_matrices(planned) == {f"model.layers.self_attn.{name}_proj.weight" for name in "qkvo"}
    mlp = [PlannedTensor(f"model.layers.0.mlp.up_proj.{end}", (96, 64), PLAIN, True) for end in ("weight", "bias")]
    llama = architecture_of_case("llama")
    assert [tensor.codec_name for tensor in with_scales(llama, 1, mlp[:1])] == [SCALED]
    assert [tensor.codec_name for tensor in with_scales(llama, 1, mlp)] == [PLAIN, PLAIN]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder of a small model with experts whose columns the type can hold."""
    folder, sizes = tmp_path_factory.mktemp("mixtral"), CASES["mixtral"][1] | {"intermediate_size": 128}
    torch.manual_seed(0)
    randomized(MixtralForCausalLM(MixtralConfig(**sizes)), "mixtral").save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def more_scales(content: Content) -> None:
    """Adds a scale that llama.cpp does not multiply by."""
    name = "blk.0.ffn_gate_inp.scale"
    content.tensors[name], content.forms[name] = np.ones(1, np.float32), GGMLQuantizationType.F32


@pytest.mark.llamacpp
def test_llamacpp_applies_what_is_written(mixtral: Path, tmp_path: Path) -> None:
    """Its logits are near those of the values that we read from the file, also with a scale for each expert."""
    quantize(Recipe(str(mixtral), PLAIN, method="rtn"), tmp_path / "out")
    artifact = Artifact(tmp_path / "out")
    (file,) = write(artifact, tmp_path / "out.gguf")
    tensors = content_of(file).tensors
    assert tensors["blk.0.attn_q.scale"].shape == (1,)
    assert tensors["blk.1.ffn_down_exps.scale"].shape == (4,)
    read, stored = GGUFModel(file), artifact.read(EXPERT)
    codec_name, planes, _ = read.planes(EXPERT)
    assert codec_name == read.codec_name(EXPERT) == stored.codec_name == SCALED
    assert planes.keys() == stored.planes.keys()
    assert all(np.array_equal(planes[plane], stored.planes[plane]) for plane in planes)
    assert check_file(file, engine=False).problems == []
    (problem,) = check_file(rewritten(file, tmp_path / "more.gguf", more_scales), engine=False).problems
    assert "1 scales of whole matrices are ignored" in problem.sentence
    assert problem.sentence.endswith(": blk.0.ffn_gate_inp.scale.")
    model = BlockModel(open_source(str(file)))
    states = model.start(torch.tensor([TOKENS]))
    for _, block in model.blocks():
        states = model.run(block, states)
    ours = model.logits(states)[0].numpy()
    with LlamaCpp(file, 32, threads=1) as llama:
        difference = np.abs(llama.logits(TOKENS) - ours).mean()
    assert difference < 0.1 * ours.std()


def test_a_correction_leaves_no_room_for_a_scale(mixtral: Path) -> None:
    """llama.cpp stops where an MLP's matrix has both. What is merged is no correction."""
    source = open_source(str(mixtral))
    for options, scaled in (({}, True), ({"rank": 8}, False), ({"rank": 8, "merge": True}, True)):
        planned = plan_recipe(source, Recipe(str(mixtral), PLAIN, **options))
        assert bool(scaled_matrices(planned)) == scaled


@pytest.mark.llamacpp
@pytest.mark.parametrize("case", ["gemma4-moe", "nemotron-h-moe"])
def test_llamacpp_multiplies_what_the_table_says(
    case: str, pieces: Path, load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """`python bench/gguf_scales.py` measures every matrix of all cases."""
    script, applied = load_script("bench/gguf_scales.py"), APPLIED[str(architecture_of_case(case).gguf)]
    file = script.f32_file(case, tmp_path, pieces)
    matrices = script.matrices_of(file)
    assert script.are_applied(file, [name for matrix in applied for name in matrices.get(matrix, [])])
