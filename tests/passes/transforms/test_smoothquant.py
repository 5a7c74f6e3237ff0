"""SmoothQuant: its equations against NumPy, the function that stays, the factors that are folded, errors that fall."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import (
    AdaRoundConfig,
    FP4DiTQuantizer,
    QuantConfig,
    capture,
    example_inputs,
    lower,
    quantizer_for,
    reconstruct,
    transform,
)
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline
from fp4dit_ao.passes.compilation import compile_blocks, compile_graph
from fp4dit_ao.passes.transforms.folding import foldable_parameters
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant, candidate_scales
from tests.graphs import TinyDiT, show, tiny_sample
from tests.passes.transforms.layers import Layer, relative

E2M1 = replace(RECIPES["w4a6_e2m1"](), skip=())


def layer_and_sample(seed: int = 0) -> tuple[Layer, dict[str, Tensor]]:
    torch.manual_seed(seed)
    x = torch.randn(2, 24, 128)
    x[..., [3, 40, 77]] *= torch.tensor([60.0, 25.0, 100.0])
    return Layer().eval(), {"x": x}


@torch.no_grad()
def quantized(graph: GraphModule, config: QuantConfig) -> GraphModule:
    return lower(convert_pt2e(prepare_pt2e(graph, FP4DiTQuantizer().set_global(config)), fold_quantize=False))


# --- equations, by NumPy ---------------------------------------------------------------------------------------------

E2M1_LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M3_LEVELS = np.array([*(i / 8 for i in range(8)), *(2.0**e * (1 + i / 8) for e in range(3) for i in range(8))])


def to_levels(x: np.ndarray, levels: np.ndarray, group: int) -> np.ndarray:
    """Every ``group`` consecutive numbers to the nearest of ``levels``, scaled by their largest magnitude."""
    blocks = x.reshape(-1, group)
    scale = np.abs(blocks).max(1, keepdims=True) / levels[-1]
    both = np.concatenate([-levels[:0:-1], levels])
    nearest = np.abs((blocks / scale)[..., None] - both).argmin(-1)
    return (both[nearest] * scale).reshape(x.shape)


@pytest.mark.parametrize("points", [1, 4])
def test_the_grid(points: int) -> None:
    generator = np.random.default_rng(0)
    x, w = generator.uniform(0.1, 30, 16), generator.uniform(0.01, 0.5, 16)
    expected = [np.ones(16)]
    for alpha in np.arange(1, points + 1) / points:
        expected += [x**-alpha] if alpha == 1 else [x**-alpha, w ** (1 - alpha) / x**alpha]
    found = list(candidate_scales(torch.tensor(x).float(), torch.tensor(w).float(), points))
    assert len(found) == len(expected) == 2 * points
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs / np.exp(np.log(theirs).mean())
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2**-8)  # rounded to bfloat16
        assert torch.equal(ours.bfloat16().float(), ours)


def test_dead_channels_get_bounded_factors() -> None:
    inputs, columns = torch.tensor([0.0, 1.0, 8.0, 1e30]), torch.tensor([0.0, 0.0, 1.0, 2.0])
    for scale in [*candidate_scales(inputs, columns, 20), *candidate_scales(torch.zeros(4), torch.zeros(4), 20)]:
        assert bool(torch.isfinite(scale).all())
        assert float(scale.max() / scale.min()) <= 2.0**27


@torch.no_grad()
def test_the_factors_are_those_that_err_least_at_the_output() -> None:
    model, sample = layer_and_sample()
    method = SmoothQuant(points=5)
    transform(capture(model, sample), [sample], [method], replace(E2M1, attention=None), progress=False)
    [group] = method.groups
    assert group.linears == ["one", "two"]
    x = sample["x"].flatten(0, 1).double().numpy()
    w = torch.cat([model.one.weight, model.two.weight]).double().numpy()
    errors, scales = [], []
    for alpha, beta in [(0, 0)] + [(a / 5, b) for a in range(1, 6) for b in ([0] if a == 5 else [0, 1 - a / 5])]:
        t = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** beta
        s = torch.tensor(np.exp(np.log(t).mean()) / t).bfloat16().double().numpy()
        product = to_levels(x * s, E2M3_LEVELS, 128) @ to_levels(w / s, E2M1_LEVELS, 128).T
        errors.append(np.square(product - x @ w.T).sum() / np.square(x @ w.T).sum())
        scales.append(s)
    before, after = method.errors["one"]
    assert before == pytest.approx(errors[0], rel=1e-3)
    assert after == pytest.approx(min(errors), rel=1e-3)
    np.testing.assert_allclose(group.scale.double().numpy(), scales[int(np.argmin(errors))])
    assert min(errors) < errors[0] / 5


# --- the graph -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_linears_that_share_an_input_are_given_one_product() -> None:
    model, sample = layer_and_sample()
    weight = model.one.weight.clone()
    graph = capture(model, sample)
    transform(graph, [sample], [SmoothQuant(points=4)], E2M1, progress=False)
    lines = [line for line in show(graph).splitlines() if not line.endswith(".bias")]
    assert lines == [
        "one_weight = self.one.weight",
        "two_weight = self.two.weight",
        "one_smooth_scale = self.one.smooth_scale",
        "mul_tensor = mul.Tensor(x, one_smooth_scale)",
        "linear = linear(mul_tensor, one_weight, one_bias)",
        "linear_1 = linear(mul_tensor, two_weight, two_bias)",
        "sub = sub.Tensor(linear, linear_1)",
        "return (sub,)",
    ]
    assert torch.equal(model.one.weight, weight), "the model that was captured stays as it is"
    scaled = graph.get_parameter("one.weight") * graph.get_buffer("one.smooth_scale")
    torch.testing.assert_close(scaled, weight)
    assert graph.get_parameter("one.weight").shape == weight.shape
    before = dict(graph.named_parameters())
    record = copy.deepcopy(graph.meta)
    again = SmoothQuant.from_record({k: v for k, v in graph.meta["fp4dit_ao_transforms"][0].items() if k != "name"})
    again.apply(graph)
    assert show(graph).count("mul.Tensor") == 1
    assert graph.meta == record
    assert all(graph.get_parameter(name) is parameter for name, parameter in before.items())


@torch.no_grad()
def test_a_weight_that_is_used_twice_has_one_vector_of_factors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.gelu(self.fc(x)))

    torch.manual_seed(0)
    model, sample = Twice().eval(), layer_and_sample()[1]
    graph = capture(model, sample)
    transform(graph, [sample], [SmoothQuant(points=4)], E2M1, progress=False)
    muls = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert [str(node.args[1].target) for node in muls] == ["fc.smooth_scale", "fc.smooth_scale"]
    assert relative(graph(**sample), model(**sample)) < 1e-6
    assert relative(quantized(graph, E2M1)(**sample), model(**sample)) < 0.5


@torch.no_grad()
def test_blocks_that_read_the_same_text_have_factors_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_k, self.to_v = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, text: Tensor) -> Tensor:
            return self.to_k(text) * self.to_v(text)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x) + self.blocks[1](x)

    torch.manual_seed(0)
    model, sample = Blocks().eval(), layer_and_sample()[1]
    method = SmoothQuant(points=2)
    graph = transform(capture(model, sample), [sample], [method], E2M1, progress=False)
    assert [group.linears for group in method.groups] == [[f"blocks.{i}.to_{n}" for n in "kv"] for i in (0, 1)]
    assert list(kinds_of_blocks(outline(quantized(graph, E2M1)))) == ["block_0"]


@torch.no_grad()
def test_a_block_without_factors_keeps_the_structure_of_the_others() -> None:
    sample = tiny_sample(tokens=16)
    model = TinyDiT(layers=2).eval()
    model.blocks[1].ff.up.weight.zero_()
    method = SmoothQuant(rows=32, points=4)
    graph = transform(capture(model, sample), [sample], [method], replace(E2M1, skip=("p*",)), progress=False)
    [zero] = [group for group in method.groups if group.linears == ["blocks.1.ff.up"]]
    assert bool((zero.scale == 1).all())
    assert list(kinds_of_blocks(outline(quantized(graph, replace(E2M1, skip=("p*",)))))) == ["block_0"]
    model.blocks[0].ff.up.weight.zero_()
    transform(capture(model, sample), [sample], [method], replace(E2M1, skip=("p*",)), progress=False)
    assert not any("ff.up" in name for group in method.groups for name in group.linears), "no block gains: no product"


class Always(SmoothQuant):
    """Factors between 1/16 and 16 for every linear, whether they help or not."""

    def _search(self, graph: GraphModule, group: Any, seen: Any) -> Tensor:
        features = graph.get_parameter(group.linears[0].weight).shape[1]
        generator = torch.Generator().manual_seed(features)
        return torch.exp2(torch.rand(features, generator=generator) * 8 - 4).bfloat16().float()


@pytest.mark.parametrize(
    ("name", "into"),
    [
        ("PixArt-Σ", {"to_v"}),
        ("Hunyuan-DiT", {"to_v", "norm2", "norm3", "skip_norm"}),
        ("DiT", {"to_v"}),
        ("FLUX.1", set()),  # its norms have no weights, and each attention is of image and text
    ],
)
@torch.no_grad()
def test_the_function_stays(name: str, into: set[str]) -> None:
    model = small_model(name)
    samples = [example_inputs(model, seed=seed) for seed in range(2)]
    captured = capture(model, samples[0])
    expected = captured(**samples[1])[0]
    for fold in (False, True):
        graph, method = copy.deepcopy(captured), Always(rows=16, fold=fold)
        transform(graph, samples[:1], [method], quantizer_for(model, "w4a6"), progress=False)
        found = graph(**samples[1])[0]
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        assert not torch.equal(found, expected)
        owners = {path.split(".")[-2] for group in method.groups for path in group.folded}
        assert owners == (into if fold else set())
        products = sum(name.endswith("smooth_scale") for name, _ in graph.named_buffers())
        assert products == sum(not group.folded for group in method.groups)


# --- folding ---------------------------------------------------------------------------------------------------------


class Folds(nn.Module):
    """One of everything that factors can be folded into, and of what they cannot be."""

    def __init__(self, heads: int = 2, width: int = 128):
        super().__init__()
        self.heads = heads
        self.norm, self.rms = nn.LayerNorm(width), nn.RMSNorm(width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.read_twice = nn.LayerNorm(width)
        for name in ("to_q", "to_k", "to_v", "to_out", "after_rms", "after_gain", "up", "down"):
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (to(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.after_rms(self.rms(x))
        x = x + self.after_gain(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain)
        y = self.read_twice(x)
        return y + self.down(F.gelu(self.up(y)))


@torch.no_grad()
def test_folded_and_multiplied_are_the_same() -> None:
    torch.manual_seed(0)
    model, sample = Folds().eval(), layer_and_sample()[1]
    model.norm.weight[5], model.rms.weight[9] = 40.0, 30.0
    config = replace(E2M1, attention=None)
    expected = model(**sample)
    graphs, methods = {}, {}
    for fold in (False, True):
        methods[fold] = SmoothQuant(fold=fold, points=4)
        graphs[fold] = transform(capture(model, sample), [sample], [methods[fold]], config, progress=False)
        assert float((graphs[fold](**sample) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert [group.folded for group in methods[True].groups] == [
        ["norm.weight", "norm.bias"], ["to_v.weight", "to_v.bias"], ["rms.weight"], ["gain"], [], [],
    ]  # fmt: skip
    assert not any(group.folded for group in methods[False].groups)
    for one, other in zip(methods[False].groups, methods[True].groups, strict=True):
        assert one.linears == other.linears
        assert torch.equal(one.scale, other.scale)
    names = [name for name, _ in graphs[False].named_parameters()]
    assert names == [name for name, _ in graphs[True].named_parameters()]
    assert [name for name, _ in graphs[True].named_buffers()] == ["up.smooth_scale", "down.smooth_scale"]
    for name in ("to_q", "to_out", "after_rms", "after_gain", "up", "down"):
        weights = [graph.get_parameter(f"{name}.weight") for graph in graphs.values()]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    errors = {fold: relative(quantized(graph, config)(**sample), expected) for fold, graph in graphs.items()}
    assert errors[True] == pytest.approx(errors[False], rel=0.02)
    plain = relative(quantized(capture(model, sample), config)(**sample), expected)
    assert errors[True] < plain * 0.8


@pytest.mark.parametrize(
    "why",
    ["", "parameter read elsewhere", "input read elsewhere", "attention of grouped heads", "heads not joined", "gate"],
)
@torch.no_grad()
def test_what_cannot_be_folded_exactly_is_not(why: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(128), nn.Linear(128, 128)
            self.q, self.v = nn.Linear(128, 128), nn.Linear(128, 64 if why == "attention of grouped heads" else 128)

        def forward(self, x: Tensor) -> Tensor:
            if why == "parameter read elsewhere":
                return self.fc(self.norm(x)) * self.norm.weight
            if why == "gate":
                return self.fc(F.silu(self.norm(x)))
            q = self.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
            v = self.v(x).unflatten(-1, (-1, 64)).transpose(1, 2)
            grouped = why == "attention of grouped heads"
            y = F.scaled_dot_product_attention(q, v if grouped else q, v, enable_gqa=grouped)
            y = y.permute(0, 2, 3, 1) if why == "heads not joined" else y.transpose(1, 2)
            y = y.flatten(2)
            return self.fc(y) * y if why == "input read elsewhere" else self.fc(y)

    graph = capture(Other().eval(), {"x": torch.randn(2, 24, 128)})
    [node] = [
        node for node in graph.graph.nodes if "fc.weight" in {str(source.target) for source in node.all_input_nodes}
    ]
    found = foldable_parameters(graph, node.args[0], [node])
    assert found == ([] if why else ["v.weight", "v.bias"])


# --- what it is good for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        ("w4a6_e2m1", 4),
        ("w4a6_nf4", 4),
        ("int_w4a6", 4),
        ("w4a6_static", 4),
        ("w4a6_auto", 4),
        ("w4a8", 1.2),
        ("nvfp4", 1),
        ("mxfp4", 1),
    ],
)
@torch.no_grad()
def test_outliers_of_channels_lose_their_effect(recipe: str, factor: float) -> None:
    """Three channels of a hundred times the others' size, which weights hardly read, as trained models have them."""
    model, sample = layer_and_sample()
    sample["x"][..., [3, 40, 77]] *= 10
    for linear in (model.one, model.two):
        linear.weight[:, [3, 40, 77]] /= 100
    config = replace(RECIPES[recipe](), skip=())
    expected = model(**sample)
    errors = []
    for transforms in ([], [SmoothQuant(points=5)]):
        graph = transform(capture(model, sample), [sample], transforms, config, progress=False)
        prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))
        prepared(**sample)
        errors.append(relative(lower(convert_pt2e(prepared, fold_quantize=False))(**sample), expected))
    assert errors[1] <= errors[0] * 1.001
    assert errors[1] <= errors[0] / factor


@torch.no_grad()
def test_compiled_whole_and_by_block() -> None:
    config = replace(E2M1, skip=("p*",))
    samples = [tiny_sample(tokens=16), tiny_sample(batch=3, tokens=9, seed=5)]
    model = TinyDiT(layers=2).eval()
    graph = transform(capture(model, samples[0]), samples, [SmoothQuant(points=4)], config, progress=False)
    lowered = quantized(graph, config)
    assert show(lowered).count("mul.Tensor") == 8
    outlined = outline(lowered)
    assert list(kinds_of_blocks(outlined)) == ["block_0"]
    whole, blocks = compile_graph(lowered), compile_blocks(lowered)
    for sample in samples:
        expected = lowered(**sample)[0]
        assert torch.equal(outlined(**sample)[0], expected)
        assert relative(whole(**sample)[0], expected) < 2e-2  # a rounded token here and there
        assert relative(blocks(**sample)[0], expected) < 2e-2


def test_rounding_is_learned_on_a_smoothed_graph() -> None:
    config = replace(E2M1, skip=("p*",))
    samples = [tiny_sample(tokens=16, seed=seed) for seed in range(4)]
    model = TinyDiT(layers=2).eval()
    with torch.no_grad():
        expected = model(**samples[0])[0]
    graph = transform(capture(model, samples[0]), samples, [SmoothQuant(points=4)], config, progress=False)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))
    report = reconstruct(prepared, samples, AdaRoundConfig(iters=60, batch_size=4), progress=False)
    assert [row.block for row in report.rows] == ["blocks.0", "blocks.1"]
    assert all(row.loss_after < row.loss_before for row in report.rows)
    with torch.no_grad():
        assert relative(lower(convert_pt2e(prepared, fold_quantize=False))(**samples[0])[0], expected) < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    model, sample = layer_and_sample()
    expected = model(**sample)
    model, sample = model.to(dtype), {"x": sample["x"].to(dtype)}
    graph = transform(capture(model, sample), [sample], [SmoothQuant(points=4)], E2M1, progress=False)
    assert graph.get_buffer("one.smooth_scale").dtype == dtype
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert relative(graph(**sample).float(), expected) < 4 * unit
    assert relative(quantized(graph, E2M1)(**sample).float(), expected) < 0.2


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, sample = layer_and_sample()
    graph = capture(model, sample)

    def smooth(samples: Any, *transforms: Any) -> None:
        transform(graph, samples, transforms or ["smoothquant"], E2M1, progress=False)

    with pytest.raises(ValueError, match=r"needs a list of samples, .*; found none; see collect_samples"):
        smooth([])
    with pytest.raises(ValueError, match="found a single dict"):
        smooth(sample)
    with pytest.raises(ValueError, match=r"calibration sample 1 does not fit the graph: missing .* 'x'"):
        smooth([sample, {"y": sample["x"]}])
    with pytest.raises(ValueError, match="calibration data at x holds NaN or Inf; run the pipeline in a wider type"):
        smooth([{"x": sample["x"] * math.inf}])
    with pytest.raises(ValueError, match="SmoothQuant needs to know the formats"):
        SmoothQuant().fit(graph, [sample])
    with pytest.raises(ValueError, match="SmoothQuant: points=0; it must be at least 1"):
        SmoothQuant(points=0)
    assert "mul" not in show(graph)
    smooth([sample])
    with pytest.raises(ValueError, match=r"smoothed already: it has one\.smooth_scale; apply smoothquant once"):
        smooth([sample])
    other = capture(TinyDiT().eval(), tiny_sample())
    for record, missing in [({"groups": [{"linears": ["three"], "folded": []}]}, "three")]:
        with pytest.raises(ValueError, match=f"no linear {missing}, which was smoothed; it is of another model"):
            SmoothQuant.from_record(record).apply(other)
        with pytest.raises(ValueError, match=f"Layer has no linear {missing}, which was smoothed"):
            SmoothQuant.from_record(record).apply_to_modules(model)
    with pytest.raises(ValueError, match="is empty"):
        SmoothQuant.from_record({"groups": [{"linears": [], "folded": []}]})
