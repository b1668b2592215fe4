"""The codec that the plan gives each tensor, compared with llama.cpp's own quantizer on synthetic models."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_mixes import types_by_llamacpp
from rich.console import Console

from lqexport.converters.gguf.mixes import LLAMA_NAMES, MIXES, file_type, other_meaning
from lqexport.converters.gguf.reader import GGUFModel
from lqexport.converters.gguf.row_order import rope_order
from lqexport.converters.models.families.llama import LLAMA
from lqexport.converters.models.tensor_names import gguf_names
from lqexport.converters.targets import plan, targets
from lqexport.errors import UserError
from lqexport.evaluation.llamacpp_quantizer import quantize
from lqexport.formats.registry import codec_named, names
from lqexport.planning.dryrun import preview
from lqexport.planning.forecast import forecast, show
from lqexport.recipe import Recipe
from lqexport.target import Target


def make_config(hidden: int = 256, layers: int = 2, heads: int = 4, kv: int = 2, tied: bool = False) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 128,
        "vocab_size": 32,
        "tie_word_embeddings": tied,
    }


def make_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (32, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in block.items()}
    return shapes


def write_source(path: Path, config: dict[str, Any]) -> None:
    """Writes a GGUF file with random weights, matrices in F16, and no tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)
    renamed = gguf_names(LLAMA, config["num_hidden_layers"])
    for name, shape in make_shapes(config).items():
        weights = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(renamed[name], weights.astype(np.float16) if len(shape) == 2 else weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_in_mix(folder: Path, config: dict[str, Any], mix: str) -> dict[str, str]:
    """Returns tensor name -> codec name, as llama.cpp's quantizer chooses."""
    write_source(folder / "source.gguf", config)
    chosen = types_by_llamacpp(folder / "source.gguf", mix)
    names = gguf_names(LLAMA, config["num_hidden_layers"])
    return {tensor: f"gguf:{chosen[name]}" for tensor, name in names.items() if name in chosen}


def types_by_plan(config: dict[str, Any], target: str, **options: Any) -> dict[str, str]:
    """Returns tensor name -> codec name, as our plan chooses."""
    return {
        tensor.name: tensor.codec_name for tensor in plan(Target.parse(target), config, make_shapes(config), **options)
    }


@pytest.mark.llamacpp
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(make_config(layers=17, heads=8, kv=4), id="untied"),
        pytest.param(make_config(layers=9, heads=8, kv=2, tied=True), id="tied-four-queries-per-key"),
        pytest.param(make_config(hidden=96, layers=9, kv=1, tied=True), id="tied-96-columns"),
        pytest.param(make_config(hidden=96, layers=3), id="untied-96-columns"),
    ],
)
def test_mix_is_llamacpps(tmp_path: Path, mix: str, config: dict[str, Any]) -> None:
    assert types_by_plan(config, f"gguf:{mix}") == types_in_mix(tmp_path, config, mix)


@pytest.mark.llamacpp
def test_a_file_of_the_quantizer_is_of_our_types_and_number(tmp_path: Path) -> None:
    """The comparisons above go by what it says in a dry run."""
    config, out = make_config(layers=9), tmp_path / "out.gguf"
    expected = types_in_mix(tmp_path, config, "IQ4_XS_MIX")
    quantize(tmp_path / "source.gguf", out, "IQ4_XS", threads=2)
    model = GGUFModel(out)
    down = "model.layers.0.mlp.down_proj.weight"  # of which llama.cpp keeps more without an importance matrix
    assert {tensor: model.codec_name(tensor) for tensor in model.names()} == expected | {down: "gguf:Q5_K"}
    assert model.metadata["general.file_type"] == file_type("IQ4_XS_MIX")


@pytest.mark.llamacpp
@pytest.mark.parametrize("mix", ["Q3_K_M", "Q4_K_S", "IQ2_M", "IQ3_S_MIX"])
@pytest.mark.parametrize("kv", [2, 4])
def test_mix_of_80_layers_is_llamacpps(tmp_path: Path, mix: str, kv: int) -> None:
    config = make_config(layers=80, kv=kv)
    assert types_by_plan(config, f"gguf:{mix}") == types_in_mix(tmp_path, config, mix)


@pytest.mark.parametrize("target", targets())
def test_every_target_plans_every_tensor_in_order(target: str) -> None:
    config = make_config()
    planned = plan(Target.parse(target), config, make_shapes(config))
    order = list(gguf_names(LLAMA, 2))
    assert [tensor.name for tensor in planned] == [name for name in order if name in make_shapes(config)]
    assert all(tensor.codec_name == "gguf:F32" and not tensor.linear for tensor in planned if len(tensor.shape) == 1)
    assert not any(tensor.reason for tensor in planned)
    assert all(tensor.nbytes > 0 for tensor in planned)


@pytest.mark.parametrize("gguf_type", [name.removeprefix("gguf:") for name in names("gguf")])
def test_pure_type(gguf_type: str) -> None:
    planned = plan(Target.parse(f"gguf:{gguf_type}"), make_config(), make_shapes(make_config()))
    plain = gguf_type in ("F32", "F16", "BF16")
    linears = [tensor for tensor in planned if ".layers." in tensor.name and len(tensor.shape) == 2]
    assert {tensor.codec_name for tensor in linears} == {f"gguf:{gguf_type}"}
    assert {tensor.linear for tensor in linears} == {not plain}
    ends = {tensor.codec_name for tensor in planned if tensor.name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert ends == {f"gguf:{gguf_type}" if plain else "gguf:Q8_0"}


@pytest.mark.parametrize(
    ("target", "columns", "expected"),
    [
        ("gguf:Q2_K", 96, "gguf:Q4_0"),
        ("gguf:Q3_K", 96, "gguf:Q4_0"),
        ("gguf:Q4_K", 96, "gguf:Q5_0"),
        ("gguf:Q5_K", 96, "gguf:Q5_1"),
        ("gguf:Q6_K", 96, "gguf:Q8_0"),
        ("gguf:IQ4_XS", 96, "gguf:IQ4_NL"),
        ("gguf:Q4_K", 48, "gguf:F16"),
        ("gguf:Q4_0", 48, "gguf:F16"),
        ("native:affine-4-g128", 192, "native:affine-4-g64"),
        ("native:affine-4-g128", 96, "native:affine-4-g32"),
        ("native:affine-4-g32", 48, "gguf:F16"),
        ("native:affine-3-row", 48, "native:affine-3-row"),
        ("native:table-3", 48, "native:table-3"),
    ],
)
def test_fallback(target: str, columns: int, expected: str) -> None:
    config = make_config(hidden=columns)
    planned = {tensor.name: tensor for tensor in plan(Target.parse(target), config, make_shapes(config))}
    tensor = planned["model.layers.1.self_attn.q_proj.weight"]
    assert tensor.codec_name == expected
    assert tensor.linear == (expected != "gguf:F16")
    if expected == target:
        assert tensor.wanted is None
        return
    assert tensor.wanted == target
    assert f"{columns} columns" in str(tensor.reason)
    with pytest.raises(UserError, match=r"cannot hold .*q_proj"):
        plan(Target.parse(target), config, make_shapes(config), fallback=False)


def test_no_fallback_is_fine_where_shapes_fit() -> None:
    config = make_config()
    assert types_by_plan(config, "gguf:Q4_K_M", fallback=False) == types_by_plan(config, "gguf:Q4_K_M")


def test_embedding_and_output_types() -> None:
    config = make_config()
    types = types_by_plan(config, "gguf:Q4_K", embedding_type="Q6_K", output_type="gguf:F16")
    assert types["model.embed_tokens.weight"] == "gguf:Q6_K"
    assert types["lm_head.weight"] == "gguf:F16"
    assert types_by_plan(config, "native:table-4")["model.embed_tokens.weight"] == "gguf:F16"


def test_options_fall_back_too() -> None:
    # llama.cpp stops half-way in this case and leaves a truncated file.
    assert types_by_plan(make_config(hidden=96), "gguf:Q4_0", embedding_type="Q6_K")["model.embed_tokens.weight"] == (
        "gguf:Q8_0"
    )


def test_tied_output_is_dropped_and_either_option_means_the_embedding() -> None:
    config = make_config(tied=True)
    shapes = make_shapes(config) | {"lm_head.weight": (32, 256)}
    planned = {
        tensor.name: tensor.codec_name for tensor in plan(Target.parse("gguf:Q4_K"), config, shapes, output_type="Q6_K")
    }
    assert "lm_head.weight" not in planned
    assert planned["model.embed_tokens.weight"] == "gguf:Q6_K"


def test_rotary_frequencies_are_ignored() -> None:
    config = make_config()
    shapes = make_shapes(config) | {"model.layers.0.self_attn.rotary_emb.inv_freq": (32,)}
    assert len(plan(Target.parse("gguf:F16"), config, shapes)) == len(shapes) - 1


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("gguf:Q9_K", {}, r"Unknown target 'gguf:Q9_K'\. Did you mean gguf:\w+, gguf:\w+ or gguf:\w+\?$"),
        ("table-3", {}, r"Unknown target 'table-3'\. Did you mean native:table-3"),
        ("awq:4", {}, r"Unknown target 'awq:4'\. Known are such as gguf:Q4_K_M, native:table-3, gptq:4-g128\.$"),
        ("gguf:Q4_K", {"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM"),
        ("gguf:Q4_K", {"num_hidden_layers": 3}, r"no tensor model\.layers\.2\.input_layernorm"),
        ("gguf:Q4_K", {"num_hidden_layers": 1}, r"num_hidden_layers=1 lacks: model\.layers\.1"),
        ("gguf:Q4_K", {"num_hidden_layers": None}, "num_hidden_layers"),
        ("gguf:Q4_K", {"num_attention_heads": 3}, "self_attn.q_proj.weight: 256 rows are not 3 heads"),
    ],
)
def test_errors(target: str, change: dict[str, Any], message: str) -> None:
    shapes = make_shapes(make_config())
    with pytest.raises(UserError, match=message):
        plan(Target.parse(target), make_config() | change, shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.self_attn.q_norm.weight": (64,)}, r"lacks: model\.layers\.0\.self_attn\.q_norm\.weight"),
        ({"model.layers.0.mlp.up_proj.weight": (256,)}, "2 dimensions"),
        ({"model.norm.weight": (1, 256)}, "1 dimensions"),
    ],
)
def test_strange_tensors(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(Target.parse("gguf:Q4_K"), make_config(), make_shapes(make_config()) | change)


def test_missing_output_says_what_to_do() -> None:
    with pytest.raises(UserError, match="tie_word_embeddings"):
        plan(Target.parse("gguf:Q4_K"), make_config(), make_shapes(make_config(tied=True)))


def test_unknown_embedding_type() -> None:
    with pytest.raises(UserError, match=r"'gguf:Q7_K' for embedding or output\. Did you mean gguf:Q\d_K"):
        plan(Target.parse("gguf:Q4_K"), make_config(), make_shapes(make_config()), embedding_type="Q7_K")


def test_rope_order() -> None:
    assert rope_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(UserError, match="6 rows"):
        rope_order(6, 2)


def test_planned_bytes_are_the_codecs() -> None:
    config = make_config()
    (tensor, *_) = [tensor for tensor in plan(Target.parse("gguf:Q4_K"), config, make_shapes(config)) if tensor.linear]
    assert tensor.nbytes == 256 * 144
    assert codec_named(tensor.codec_name).block == 256


def test_a_type_that_llamacpp_calls_a_mix(tiny_model: Path, tmp_path: Path) -> None:
    """A dry run and a forecast say once that the name means another thing to users of llama.cpp."""
    assert set(LLAMA_NAMES) <= {name.removeprefix("gguf:") for name in names("gguf")}
    assert set(LLAMA_NAMES.values()) <= set(MIXES)
    for name in ("gguf:Q2_K_M", "gguf:IQ3_XS", "gguf:Q8_0", "gguf:Q4_0", "gguf:auto", "mlx:4-g64"):
        assert other_meaning(Target.parse(name)) == []
    (of_q3,) = other_meaning(Target.parse("q3_k"))
    assert of_q3 == "gguf:Q3_K is that type in every linear; what llama.cpp calls Q3_K is the mix gguf:Q3_K_M."
    recipe = Recipe(str(tiny_model), "gguf:Q2_K", method="rtn")
    (said,) = other_meaning(recipe.parsed_target)
    assert "the mix gguf:Q2_K_M, which is smaller and better by default (docs/quality.md)" in said
    assert preview(recipe, tmp_path / "out").warnings == (said,)
    console = Console(file=io.StringIO(), width=300)
    show(forecast(tiny_model, recipe), console)
    assert console.file.getvalue().count(f"Warning: {said}") == 1
