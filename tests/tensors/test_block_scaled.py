"""NVFP4, MXFP4 and MXFP6: against torchao's own quantization, the OCP definitions, and float64."""

import copy
import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.export import Dim
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import (
    AdaRoundConfig,
    FloatFormat,
    FP4DiTConfig,
    FP4DiTQuantizer,
    QuantConfig,
    calibrate,
    capture,
    example_inputs,
    load_pipeline,
    lower,
    quantize_modules,
    quantize_pipeline,
    reconstruct,
)
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.formats import pack
from fp4dit_ao.ops import dequantize, quantize
from fp4dit_ao.ops.block_scale import BLOCKS, choose_block_scale, power_of_two_above, two_level_scale, unit
from fp4dit_ao.passes.subclass_unwrapping import unwrap
from fp4dit_ao.tensors.block_scaled import ELEMENTS, MXWeight, NVFP4Weight
from tests.graphs import TinyDiT, tiny_sample
from tests.passes.test_lowering import LINEAR, EveryLinear, converted
from tests.tiny import CALL, tiny_pipeline

RECIPES = ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"]
OCP = {
    "e2m1": ml_dtypes.float4_e2m1fn, "e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn,
}  # fmt: skip


def wild(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose blocks span forty powers of two; the first block is zero."""
    g = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 20, (96, 16), generator=g).float()
    x = torch.randn(96, 512, generator=g) * torch.exp2(exponents).repeat_interleave(32, 1)
    x[0, :32] = 0
    return x.to(dtype)


# --- scales and codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", OCP)
def test_levels_times_the_unit_are_the_ocp_values(fmt) -> None:
    lattice = FloatFormat.parse(fmt)
    codes = np.arange(2**lattice.bits, dtype=np.uint8)
    values = codes.view(OCP[fmt]).astype(np.float64)
    assert [lattice.level(int(code)) * unit(lattice) for code in codes] == values.tolist()


@pytest.mark.parametrize("fmt", OCP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mx_is_torchaos_bit_for_bit(fmt, dtype) -> None:
    x = wild(dtype)
    expected = MXTensor.to_mx(x, ELEMENTS[fmt], 32, ScaleCalculationMode.RCEIL)
    step = choose_block_scale(x, [1, 32], fmt, "e8m0")
    codes = quantize(x, [1, 32], step, fmt)
    ours = MXWeight.from_codes(codes, step, fmt, dtype)
    assert torch.equal(ours.qdata, expected.qdata)
    zero = torch.zeros(96, 16, dtype=torch.bool)
    zero[0, 0] = True  # any scale does: torchao takes the smallest, ours stays clear of float32's subnormals
    assert torch.equal(ours.scale.view(torch.uint8)[~zero], expected.scale.view(torch.uint8)[~zero])
    assert torch.equal(ours.dequantize(torch.float32), expected.dequantize(torch.float32))
    assert torch.equal(dequantize(codes, [1, 32], step, fmt, torch.float32), expected.dequantize(torch.float32))


@pytest.mark.parametrize("fmt", OCP)
def test_every_bfloat16_magnitude_gets_torchaos_scale(fmt) -> None:
    """All finite magnitudes, but the lowest: there torchao's scale goes down to 2^-127, where ours stops at a normal step."""
    every = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = torch.zeros(len(every), 32, dtype=torch.bfloat16)
    x[:, 3] = every
    expected = MXTensor.to_mx(x, ELEMENTS[fmt], 32, ScaleCalculationMode.RCEIL)
    step = choose_block_scale(x, [1, 32], fmt, "e8m0")
    ours = MXWeight.from_codes(quantize(x, [1, 32], step, fmt), step, fmt, torch.bfloat16)
    normal = every.float() >= 2.0**-110
    assert normal.sum() > 30000
    assert torch.equal(ours.scale.view(torch.uint8)[normal], expected.scale.view(torch.uint8)[normal])
    assert torch.equal(ours.qdata[normal], expected.qdata[normal])


@settings(max_examples=300)
@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_the_power_of_two_is_the_next_one(value) -> None:
    got = Fraction(power_of_two_above(torch.tensor([value])).item())
    assert got >= Fraction(value) > got / 2
    mantissa = got.numerator if got >= 1 else got.denominator
    assert mantissa & (mantissa - 1) == 0


def test_powers_of_two_at_the_ends() -> None:
    ends = torch.tensor([2.0**127 * 1.5, float("nan"), 2.0**-126])
    assert power_of_two_above(ends).tolist()[::2] == [2.0**127, 2.0**-126]
    assert power_of_two_above(ends)[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_torchaos_but_where_a_quotient_is_a_tie(dtype) -> None:
    """torchao multiplies by a reciprocal, we divide: a quotient within rounding of two levels' middle may go either way."""
    x = torch.randn(96, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, :16] = 0
    whole = per_tensor_amax_to_scale(x.abs().max())
    expected = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=whole)
    scale, tensor = two_level_scale(x, [1, 16], "e2m1")
    codes = quantize(x, [1, 16], scale * tensor, "e2m1")
    ours = NVFP4Weight.from_codes(codes, scale, tensor, dtype)
    assert torch.equal(ours.per_tensor_scale, whole)
    assert torch.equal(ours.scale.view(torch.uint8), expected.scale.view(torch.uint8))
    differ = (pack(codes, 4) != expected.qdata).repeat_interleave(2, 1)
    quotient = x.double().abs() / (scale.double() * tensor.double()).repeat_interleave(16, 1)
    middles = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0], dtype=torch.float64)
    from_middle = ((quotient[..., None] - middles).abs() / middles).amin(-1)
    tie = from_middle.unflatten(1, (-1, 2)).amin(-1).repeat_interleave(2, 1) < 2**-21
    assert not (differ & ~tie).any()
    assert differ.float().mean() < 0.005
    same = ~differ
    wide = NVFP4Tensor(
        expected.qdata, expected.scale, 16, torch.float32, whole
    )  # torchao 0.17 rounds scales to the type
    assert torch.allclose(ours.dequantize(torch.float32)[same], wide.dequantize(torch.float32)[same], rtol=3e-7, atol=0)


def test_scales_of_nothing_are_numbers() -> None:
    for kind in BLOCKS:
        step = choose_block_scale(torch.zeros(2, 64), [1, BLOCKS[kind]], "e2m1", kind)
        assert torch.isfinite(step).all()
        assert (step > 0).all()


# --- linears ---------------------------------------------------------------------------------------------------------


def weight_of(
    recipe: str, seed: int = 0, shape: tuple[int, int] = (48, 128), dtype: torch.dtype = torch.float32
) -> Any:
    config = QuantConfig.from_name(recipe)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    block = [1, config.group_size]
    if config.scale_dtype == "e4m3":
        scale, tensor = two_level_scale(w, block, config.weight)
        return NVFP4Weight.from_codes(quantize(w, block, scale * tensor, config.weight), scale, tensor, dtype)
    step = choose_block_scale(w, block, config.weight, "e8m0")
    return MXWeight.from_codes(quantize(w, block, step, config.weight), step, config.weight, dtype)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_against_float64(recipe, dtype, bias) -> None:
    config, w = QuantConfig.from_name(recipe), weight_of(recipe, dtype=dtype)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    b = torch.randn(48).to(dtype) if bias else None
    step = choose_block_scale(x, [1, 1, config.group_size], config.weight, config.scale_dtype)
    codes = quantize(x, [1, 1, config.group_size], step, config.weight)
    lattice = FloatFormat.parse(config.weight)
    values = lattice.decode(codes).double() * step.double().repeat_interleave(config.group_size, -1)
    exact_weight = w.dequantize(torch.float32).double()
    exact = values @ exact_weight.T + (0 if b is None else b.double())
    magnitude = values.abs() @ exact_weight.abs().T + (0 if b is None else b.double().abs())
    y = F.linear(x, w, b)
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    assert ((y.double() - exact).abs() <= 1e-6 * magnitude + rounding * exact.abs()).all()


def test_tensors_are_torchaos() -> None:
    assert isinstance(weight_of("mxfp4"), MXTensor)
    assert isinstance(weight_of("nvfp4"), NVFP4Tensor)


@pytest.mark.parametrize("recipe", ["mxfp6_e2m3", "mxfp6_e3m2"])
def test_torchaos_emulation_agrees(recipe) -> None:
    """In bfloat16, as torchao's config has it: operands are exact there, so only the sums' rounding differs."""
    w = weight_of(recipe, dtype=torch.bfloat16)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours, theirs = F.linear(x, w), w.on_torchao(x, torch.zeros(48))
    assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_linear_by_linear(recipe, dtype) -> None:
    sample = {k: v.to(dtype) for k, v in tiny_sample(batch=3, tokens=17).items()}
    graph = capture(TinyDiT(layers=2).to(dtype), sample)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(QuantConfig.from_name(recipe)))
    prepared(**sample)
    graph = convert_pt2e(prepared)
    lowered = lower(graph)
    kept = copy.deepcopy(graph.state_dict())
    expected_out, out = graph(**sample)[0], lowered(**sample)[0]
    assert torch.isfinite(out).all()
    if dtype == torch.float32:
        assert (out - expected_out).norm() <= 1e-5 * expected_out.norm()
    reference = EveryLinear(graph)
    reference.run(*sample.values(), False)
    nodes = [n for n in lowered.graph.nodes if n.target is LINEAR]
    low_bit = 0
    for node, (arguments, expected) in zip(nodes, reference.seen, strict=True):
        weight = lowered.get_parameter(str(node.args[1].target))
        if isinstance(weight, MXWeight | NVFP4Weight):
            low_bit += 1
            # quantizing what is quantized already changes nothing, but by the tensor's scale of NVFP4, which is rounded
            got = F.linear(arguments[0], weight, arguments[2])
            tolerance = 2e-6 if dtype == torch.float32 else 2**-7
            assert (got - expected).abs().max() <= tolerance * 4 * expected.abs().max()
    assert low_bit == 12
    assert set(lowered.state_dict()) == set(TinyDiT(layers=2).state_dict())
    assert all(torch.equal(v, kept[k]) for k, v in graph.state_dict().items())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_unwrapped_for_export(recipe, dtype) -> None:
    graph, sample = converted(QuantConfig.from_name(recipe), dtype)
    lowered = lower(graph)
    plain = unwrap(lowered)
    assert not any(isinstance(x.detach(), TorchAOBaseTensor) for x in (*plain.parameters(), *plain.buffers()))
    assert torch.equal(plain(**sample)[0], lowered(**sample)[0])


@torch.no_grad()
def test_mx_weights_are_exported_with_the_same_bits() -> None:
    graph, sample = converted(QuantConfig.from_name("mxfp4"))
    lowered = lower(graph)
    dynamic = {name: dict.fromkeys(range(x.ndim), Dim.AUTO) for name, x in sample.items()} | {"return_dict": None}
    constants = {"return_dict": False}
    file = io.BytesIO()
    torch.export.save(torch.export.export(unwrap(lowered), (), sample | constants, dynamic_shapes=dynamic), file)
    file.seek(0)
    again = torch.export.load(file).module()
    for inputs in (sample, tiny_sample(batch=2, tokens=9)):
        assert torch.equal(again(**inputs, **constants)[0], lowered(**inputs)[0])


def test_what_exported_files_call_is_there_without_torchao() -> None:
    code = (
        "import sys, fp4dit_ao.deploy.exported_transformer, torch; torch.ops.fp4dit_ao.mx_dequantize; "
        "sys.exit('torchao' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4"])
@torch.no_grad()
def test_compiles_whole(recipe) -> None:
    w, bias = weight_of(recipe), torch.randn(48)
    module = torch.nn.Linear(128, 48)
    module.weight, module.bias = torch.nn.Parameter(w, requires_grad=False), torch.nn.Parameter(bias)
    compiled = torch.compile(lambda x: module(F.silu(x)), fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x = torch.randn(2, rows, 128)
        assert torch.allclose(compiled(x), module(F.silu(x)), rtol=1e-4, atol=1e-4)


def test_moving_and_casting_keeps_codes() -> None:
    for recipe in RECIPES:
        w = weight_of(recipe)
        half = w.to(torch.bfloat16)
        assert type(half) is type(w)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half.qdata, w.qdata)
        assert torch.equal(half.dequantize(torch.float32), w.dequantize(torch.float32))
        assert type(w.to("cpu")) is type(w)


# --- the rest of the way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp6_e3m2"])
def test_a_pipeline_comes_back_from_disk(recipe, tmp_path: Path) -> None:
    pipe = quantize_pipeline(
        tiny_pipeline(layers=1), recipe, prompts=["a red cat"], rounding="nearest", progress=False, **CALL
    )
    pipe.save_pretrained(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved")
    image = lambda p: np.asarray(p("a cat", generator=torch.Generator().manual_seed(0), **CALL).images[0])  # noqa: E731
    assert (image(pipe) == image(again)).all()
    stored = [p for p in again.transformer.graph.parameters() if isinstance(p.detach(), MXWeight | NVFP4Weight)]
    assert len(stored) == 10
    assert again.transformer.nbytes() == pipe.transformer.nbytes()


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4", "mxfp6_e3m2"])
def test_the_module_form_has_the_graphs_bits(recipe, tmp_path: Path) -> None:
    graph = quantize_pipeline(
        tiny_pipeline(layers=1), recipe, prompts=["a red cat"], rounding="nearest", progress=False, **CALL
    ).transformer
    sample = example_inputs(empty_model(dict(graph.config)))
    with torch.no_grad():
        expected = graph(**sample).sample
    model = quantize_modules(tiny_pipeline(layers=1).transformer, recipe)
    model.save_pretrained(tmp_path / "saved")
    tiny_pipeline(layers=1).transformer.save_pretrained(tmp_path / "float")
    again = type(model).from_pretrained(tmp_path / "saved")
    while_read = type(model).from_pretrained(tmp_path / "float", quantization_config=FP4DiTConfig(recipe))
    for each in (model, graph.to_modules(), again, while_read, load_graph(tmp_path / "saved")):
        assert sum(isinstance(p.detach(), MXWeight | NVFP4Weight) for p in each.parameters()) == 10
        with torch.no_grad():
            assert torch.equal(each(**sample).sample, expected)
    half = type(model).from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    low = {name: p.dequantize(torch.float32) for name, p in again.named_parameters() if hasattr(p, "qdata")}
    assert all(torch.equal(half.get_parameter(name).dequantize(torch.float32), x) for name, x in low.items())
    again.dequantize()
    assert all(torch.equal(again.get_parameter(name), x) for name, x in low.items())


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp6_e2m3"])
def test_the_module_form_offloads_and_compiles(recipe) -> None:
    model = quantize_modules(tiny_pipeline(layers=1).transformer, recipe)
    sample = example_inputs(model)
    with torch.no_grad():
        expected = model(**sample).sample
        compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(**sample).sample, expected, rtol=1e-4, atol=1e-4)
        cpu = torch.device("cpu")
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        for _ in range(2):
            assert torch.equal(model(**sample).sample, expected)


def test_families_whose_modulation_is_finer_take_block_formats() -> None:
    """They are one for all layers."""
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=64,
        pooled_projection_dim=64, in_channels=16, axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip
    quantize_modules(model, "nvfp4")
    assert isinstance(model.transformer_blocks[0].norm1.linear.weight.detach(), NVFP4Weight)
    with torch.no_grad():
        assert torch.isfinite(model(**example_inputs(model), return_dict=False)[0]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"scale_dtype": "float32"},
        {"group_size": 16},
        {"activation_granularity": "token"},
        {"weight_search": "mse"},
        {"weight_granularity": "channel"},
        {"activation": None},
        {"activation": "e2m3"},
        {"weight": "e3m0", "activation": "e3m0"},
        {"weight_candidates": ("e2m1", "e3m0")},
        {"pre_gelu_weight": "e3m0"},
        {"scale_dtype": "e4m3", "group_size": 16, "weight": "e2m3", "activation": "e2m3"},
    ],
)
def test_what_is_no_block_format_is_refused(change) -> None:
    mx = {
        "weight": "e2m1",
        "activation": "e2m1",
        "group_size": 32,
        "activation_granularity": "block",
        "pre_gelu_weight": None,
        "scale_dtype": "e8m0",
    }
    QuantConfig(**mx)
    with pytest.raises(ValueError, match=r"QuantConfig: .*block"):
        QuantConfig(**(mx | change))


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4"])
def test_learned_rounding_reaches_the_lowered_weights(recipe) -> None:
    samples = [tiny_sample(seed=seed) for seed in range(4)]
    graph = capture(TinyDiT(), samples[0])
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(QuantConfig.from_name(recipe)))
    calibrate(prepared, samples)
    report = reconstruct(prepared, samples, AdaRoundConfig(iters=60, batch_size=8, relative_lr=0.2), progress=False)
    assert any(row.changed > 0 for row in report.rows)
    graph = convert_pt2e(prepared)
    lowered = lower(graph)
    with torch.no_grad():
        expected, got = graph(**samples[0])[0], lowered(**samples[0])[0]
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    name = "blocks.0.ff.up.weight"
    assert torch.equal(lowered.get_parameter(name).codes, graph.get_buffer(f"{name}_codes"))
