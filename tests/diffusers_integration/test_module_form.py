"""The module form computes what the graph form does, to the last bit, and stays a diffusers model: LoRA, offloading, …"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fp4dit_ao import (
    AdaRoundConfig,
    MinifloatTensor,
    QuantConfig,
    example_inputs,
    load_pipeline,
    quantize_modules,
    quantize_pipeline,
)
from fp4dit_ao.diffusers_integration.module_form import is_module_form
from tests.tiny import CALL, tiny_pipeline


@pytest.fixture(scope="module")
def graph() -> Any:
    how = {"adaround": AdaRoundConfig(iters=60, batch_size=2, relative_lr=0.2), "skip": ["*attn2*"], "progress": False}
    return quantize_pipeline(
        tiny_pipeline(layers=1), "w4a6", prompts=["a red cat", "a blue dog"], samples=2, **how, **CALL
    )


@pytest.fixture(scope="module")
def folder(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "pipe"
    graph.save_pretrained(path)
    return path


@pytest.fixture
def pipe(folder: Path) -> Any:
    loaded = load_pipeline(folder, form="module")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """Rounded to nearest, of three blocks."""
    return quantize_modules(tiny_pipeline(layers=3).transformer, "w4a6")


@pytest.fixture
def model(quantized: nn.Module) -> nn.Module:
    return copy.deepcopy(quantized)


def run(model: nn.Module, **change: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**(example_inputs(model) | change), return_dict=False)[0]


def draw(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipe("a red cat", **CALL, generator=generator, output_type="np").images)


def low_bit(model: nn.Module) -> dict[str, MinifloatTensor]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, MinifloatTensor)}


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_learned_codes_carry_over(graph: Any, pipe: Any) -> None:
    nearest = low_bit(quantize_modules(tiny_pipeline(layers=1).transformer, "w4a6", skip=["*attn2*"]))
    ours, theirs = low_bit(pipe.transformer), low_bit(graph.transformer.graph)
    assert ours.keys() == theirs.keys() == nearest.keys()
    for name, weight in ours.items():
        other = theirs[name]
        assert torch.equal(weight.qdata, other.qdata)
        assert torch.equal(weight.scale, other.scale)
        for attribute in MinifloatTensor.tensor_attribute_names:
            assert getattr(weight, attribute) == getattr(other, attribute)
    assert any(not torch.equal(weight.qdata, nearest[name].qdata) for name, weight in ours.items())


def test_every_linear_of_the_graph_has_the_modules_bits(graph: Any, pipe: Any) -> None:
    for name, weight in low_bit(graph.transformer.graph).items():
        linear = pipe.transformer.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(2, 5, linear.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(linear(x), torch.ops.aten.linear.default(x, weight, linear.bias))


def test_images_are_the_graphs(graph: Any, pipe: Any) -> None:
    """Attention included."""
    assert type(pipe.transformer).__name__ == "PixArtTransformer2DModel"
    np.testing.assert_array_equal(draw(pipe), draw(graph))


def test_a_graph_becomes_modules_in_memory(graph: Any) -> None:
    model = graph.transformer.to_modules()
    assert is_module_form(model)
    sample = example_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**sample).sample, graph.transformer(**sample).sample)


def test_q_k_and_v_are_quantized_where_the_recipe_says_so(model: nn.Module) -> None:
    without = quantize_modules(tiny_pipeline(layers=3).transformer, QuantConfig(attention=None))
    assert not torch.equal(run(model), run(without))
    kinds = [type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")]
    assert kinds == ["QuantizedAttnProcessor2_0"] * 6
    assert [type(m.processor).__name__ for m in without.modules() if hasattr(m, "processor")] == [
        "AttnProcessor2_0"
    ] * 6


def test_a_static_range_is_the_graphs_alone(tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    with pytest.raises(
        ValueError, match="static input ranges, which only the graph form computes; use quantize_pipeline,"
    ):
        quantize_modules(tiny_pipeline(layers=1).transformer, "w4a6_static")
    pipe = quantize_pipeline(
        tiny_pipeline(layers=1), "w4a6_static", prompts=["a cat"], samples=1, rounding="nearest", progress=False, **CALL
    )
    with pytest.raises(ValueError, match="quantizes its input in a static range, which only the graph form computes"):
        pipe.transformer.to_modules()
    pipe.save_pretrained(tmp_path / "static")
    with pytest.raises(ValueError, match=r"^\S+ quantizes its input in a static range.*; use form='graph'"):
        load_pipeline(tmp_path / "static", form="module")
    with pytest.raises(ValueError, match=r"^\S+ quantizes its input in a static range.*; use form='graph'"):
        PixArtTransformer2DModel.from_pretrained(tmp_path / "static" / "transformer")


def test_split_linears_split_in_both_forms() -> None:
    from diffusers import HunyuanDiT2DModel

    from fp4dit_ao.passes.transforms.split_inputs import SplitLinear

    torch.manual_seed(0)
    float_model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=64, in_channels=4, patch_size=2, hidden_size=128, sample_size=8,
        mlp_ratio=2.0, num_layers=4, cross_attention_dim=64, cross_attention_dim_t5=64, pooled_projection_dim=64, text_len=5,
        text_len_t5=7,
    ).eval()  # fmt: skip
    sample = example_inputs(float_model)
    model = quantize_modules(copy.deepcopy(float_model), "w4a6")
    graph = lowered(float_model, sample)
    parts = [name for name, m in model.named_modules() if isinstance(m, SplitLinear)]
    assert parts == ["blocks.3.skip_linear"]
    with torch.no_grad():
        assert torch.equal(model(**sample, return_dict=False)[0], graph(**sample)[0])


def lowered(model: nn.Module, sample: dict[str, Any]) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from fp4dit_ao import capture, lower, quantizer_for

    with torch.no_grad():
        return lower(convert_pt2e(prepare_pt2e(capture(model, sample), quantizer_for(model, "w4a6"))))


# --- what is quantized -----------------------------------------------------------------------------------------------


def test_models_that_no_table_knows() -> None:
    class Unknown(type(tiny_pipeline(layers=1).transformer)):  # type: ignore[misc]
        pass

    with pytest.warns(UserWarning, match="Unknown is no family that fp4dit_ao knows"):
        model = quantize_modules(unknown(Unknown), "w4a6")
    reference = quantize_modules(tiny_pipeline(layers=1).transformer, QuantConfig(pre_gelu_weight=None))
    assert {n for n in low_bit(model) if "blocks" in n} == {n for n in low_bit(reference) if "blocks" in n}
    assert all(".0." in name for name in low_bit(model))
    with pytest.raises(ValueError, match="cannot tell which linears feed a gate; give sample="):
        quantize_modules(unknown(Unknown), QuantConfig())
    again = quantize_modules(
        unknown(Unknown), QuantConfig(), sample=example_inputs(tiny_pipeline(layers=1).transformer)
    )
    assert low_bit(again)["transformer_blocks.0.ff.net.0.proj.weight"].fmt == "e3m0"


def unknown(cls: type) -> Any:
    return cls.from_config(tiny_pipeline(layers=1).transformer.config)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "w3a3"}, "unknown recipe 'w3a3'"),
        ({"recipe": "w4a6_auto"}, "needs calibration data"),
        ({"skip": ["nothing.*"]}, "matches no linear or attention"),
        ({"recipe": QuantConfig(group_size=96)}, "groups of 96 do not divide its 128 input features"),
    ],
)
def test_recipes_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_modules(tiny_pipeline(layers=1).transformer, **arguments)


def test_back_to_float(model: nn.Module) -> None:
    weights = {name: w.dequantize() for name, w in low_bit(model).items()}
    model.dequantize()  # type: ignore[operator]
    assert not is_module_form(model)
    assert not low_bit(model)
    assert all(torch.equal(model.get_parameter(name), w) for name, w in weights.items())
    assert [type(m.processor).__name__ for m in model.modules() if hasattr(m, "processor")] == ["AttnProcessor2_0"] * 6
    assert quantize_modules(model) is model


# --- placement -------------------------------------------------------------------------------------------------------


def test_to_another_dtype_leaves_codes_and_scales(model: nn.Module) -> None:
    before = low_bit(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    out = run(half)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()
    reference = run(model)
    assert (out.float() - reference).norm() < 0.2 * reference.norm()
    for name, weight in low_bit(half).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.qdata, before[name].qdata)
        assert torch.equal(weight.scale, before[name].scale)


def test_a_pipeline_offloads_its_components(pipe: Any) -> None:
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    hooked = {name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")}
    assert "transformer" in hooked
    np.testing.assert_array_equal(draw(pipe), expected)
    pipe.maybe_free_model_hooks()
    np.testing.assert_array_equal(draw(pipe), expected)


@pytest.mark.parametrize(
    "how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_groups_of_layers_offload(model: nn.Module, how: dict[str, Any]) -> None:
    expected = run(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **how)  # type: ignore[operator]
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in example_inputs(model).items()}
    for _ in range(2):
        assert torch.allclose(run(model, **inputs).cpu(), expected, atol=0 if device.type == "cpu" else 1e-4)


def test_swapping_contents_moves_codes_and_scales() -> None:
    """How diffusers moves a group."""
    weight = nn.Parameter(MinifloatTensor.from_hp(torch.randn(8, 128), [1, 128], "e2m1", "e2m3"), requires_grad=False)
    other = MinifloatTensor.from_hp(torch.randn(8, 128), [1, 128], "e2m1", "e2m3")
    expected = other.qdata
    assert not weight.is_pinned()
    torch.utils.swap_tensors(weight, nn.Parameter(other.data, requires_grad=False))
    assert torch.equal(weight.qdata, expected)


# --- compilation -----------------------------------------------------------------------------------------------------


def compile_whole(model: Any) -> None:
    model.compile(fullgraph=True, backend=count)


def compile_blocks(model: Any) -> None:
    model.compile_repeated_blocks(fullgraph=True, backend=count)


COMPILED: list[Any] = []


def count(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.debugging import aot_eager

    COMPILED.append(graph)
    return aot_eager(graph, inputs)


@pytest.mark.parametrize(("compile", "graphs"), [(compile_whole, 1), (compile_blocks, 2)])
def test_compiled_whole_or_one_block_for_all(model: nn.Module, compile: Callable[[Any], None], graphs: int) -> None:
    """As many compilations as of the float model: the first of its blocks gets an input of other strides."""
    torch._dynamo.reset()
    COMPILED.clear()
    expected = run(model)
    compile(model)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    assert len(COMPILED) == graphs
    model.to("cpu")  # moving goes on working, and costs no compilation
    run(model)
    assert len(COMPILED) == graphs


def test_inductor_compiles_the_module_form(model: nn.Module) -> None:
    torch._dynamo.reset()
    block = model.transformer_blocks[0].ff  # type: ignore[index]
    x = torch.randn(2, 6, 128)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)
