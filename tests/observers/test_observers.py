"""Observers: their scales and choices, and the graph they leave behind under torchao's own prepare and convert."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import TestCase
from torch import Tensor, nn
from torchao.quantization.granularity import Granularity, PerAxis, PerGroup, PerTensor, PerToken
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from fp4dit_ao.formats import parse
from fp4dit_ao.kernels.candidate_search import CANDIDATE_SEARCH, SearchOperands
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.observers import StaticActivationObserver, TokenActivationObserver, WeightObserver, set_fake_quantize
from fp4dit_ao.observers.scale_search import SEARCHES, squared_error
from tests.graphs import show

GRANULARITIES = [(PerTensor(), (1, 1)), (PerAxis(0), (8, 1)), (PerGroup(32), (8, 2))]
each_granularity = pytest.mark.parametrize(("granularity", "blocks"), GRANULARITIES, ids=str)
FORMATS = ["e1m2", "e2m1", "e3m0", "int4", "nf4"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(values: np.ndarray, scale: np.ndarray, name: str) -> np.ndarray:
    """float64, by brute force over all levels."""
    levels = parse(name).lattice.numpy().astype(np.float64) * scale[..., None]
    index = np.abs(levels - values[..., None]).argmin(-1)
    return np.take_along_axis(levels, index[..., None], -1)[..., 0]


def element_scales(observer: WeightObserver, weight: Tensor) -> np.ndarray:
    scale = observer.scale.double()
    repeats = [size // count for size, count in zip(weight.shape, scale.shape, strict=True)]
    return scale.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1).numpy()


def squared_errors(observer: WeightObserver, weight: Tensor) -> Tensor:
    """Of every block, float64."""
    error = (observer.dequantized(weight).double() - weight.double()).square()
    rows, groups = observer.scale.shape
    return error.reshape(rows, weight.shape[0] // rows, groups, -1).sum(dim=(1, 3))


# --- weights ---------------------------------------------------------------------------------------------------------


@each_granularity
@pytest.mark.parametrize(
    ("name", "search"),
    [(name, search) for name in FORMATS for search in sorted(SEARCHES) if search != "four_over_six" or name == "e2m1"],
)
def test_weights_take_the_nearest_level_of_their_scale(
    name: str, search: str, granularity: Granularity, blocks: tuple[int, int]
) -> None:
    weight = normal(8, 64) * 0.05
    observer = WeightObserver(name, granularity, search)
    assert observer(weight) is weight, "an observer that only observes changes nothing"
    assert observer.scale.shape == blocks and observer.scale.dtype == torch.float32
    codes, scale = observer.quantized(weight)
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape and scale is observer.scale
    expected = nearest(weight.double().numpy(), element_scales(observer, weight), name)
    np.testing.assert_allclose(observer.dequantized(weight).numpy(), expected, rtol=1e-6)
    if search == "absmax":
        absmax = weight.reshape(blocks[0], -1, blocks[1], 64 // blocks[1]).abs().amax(dim=(1, 3))
        assert torch.equal(scale, absmax / parse(name).lattice_max)

    observer.fake_quantize = True
    assert torch.equal(observer(weight), observer.dequantized(weight))
    observer.paused = True
    assert observer(weight) is weight


@each_granularity
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_mse_is_never_worse_than_absmax(
    name: str, scale_dtype: torch.dtype, granularity: Granularity, blocks: tuple[int, int]
) -> None:
    """Block by block, by its own measure; also where a block is all zero, one value, huge, or too small for the scale."""
    weight = normal(8, 64) * 0.05
    weight[1], weight[2], weight[3], weight[4, 3] = 0, 0.25, weight[3] * 1e-8, 1e4
    errors = {}
    for search in ("absmax", "mse"):
        observer = WeightObserver(name, granularity, search, scale_dtype)
        observer(weight)
        assert observer.scale.dtype == scale_dtype and (observer.scale > 0).all() and observer.scale.isfinite().all()
        errors[search] = squared_errors(observer, weight)
    assert (errors["mse"] <= errors["absmax"] * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("group", [32, 12, 1000, -1])
@pytest.mark.parametrize("name", FORMATS)
def test_the_compiled_search_finds_what_the_operators_find(
    name: str, group: int, scale_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, weight = parse(name), normal(6, 3000 if group > 0 else 777)
    weight = weight[:, : weight.shape[1] // max(1, group) * max(1, group)] * torch.logspace(-3, 3, 6)[:, None]
    weight[0] = 0
    block = [1, group]
    found = SEARCHES["mse"](weight, block, fmt, scale_dtype)
    operands = SearchOperands(fmt, weight.device, grouped=True)
    assert CANDIDATE_SEARCH.pick(operands).name == "compiled loop" or native.shared_object() is None
    monkeypatch.setattr(CANDIDATE_SEARCH, "units", CANDIDATE_SEARCH.units[1:])
    expected = SEARCHES["mse"](weight, block, fmt, scale_dtype)
    assert found.dtype == expected.dtype == scale_dtype and found.shape == expected.shape
    errors = [squared_error(weight, block, fmt, scale) for scale in (found, expected)]
    torch.testing.assert_close(*errors, rtol=2e-6, atol=0)  # sums in another order may prefer an equally good scale
    assert (found == expected).float().mean() > 0.95
    assert torch.equal(found[0], expected[0]), "of equals, absmax"


def test_mse_finds_a_better_scale_where_there_is_one() -> None:
    weight = normal(32, 128, seed=1)
    found = {}
    for search in ("absmax", "mse"):
        observer = WeightObserver("int4", PerGroup(128), search)
        observer(weight)
        found[search] = squared_errors(observer, weight).sum()
    assert found["mse"] < 0.9 * found["absmax"]


def test_learned_codes_replace_nearest_ones() -> None:
    weight = normal(8, 64)
    observer = WeightObserver("e2m1", PerGroup(32))
    observer(weight)
    codes = observer.quantized(weight)[0]
    observer.codes = (codes ^ 1).clone()
    assert torch.equal(observer.quantized(weight)[0], codes ^ 1)
    assert not torch.equal(observer.dequantized(weight), WeightObserver("e2m1", PerGroup(32)).dequantized(weight))
    observer.rounding, observer.fake_quantize = nn.Softplus(), True
    assert torch.equal(observer(weight), nn.functional.softplus(weight)), (
        "while it is learned, the rounding has its way"
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_numbers_are_refused_by_name_and_shape(value: float) -> None:
    weight = normal(8, 64)
    weight[2, 3] = weight[5, 1] = value
    message = r"weight blocks\.0\.fc\.weight of shape \(8, 64\) holds 2 NaN or Inf of 512 values; repair the checkpoint"
    for ask in (WeightObserver.forward, WeightObserver.quantized):
        with pytest.raises(ValueError, match=message):
            ask(WeightObserver("e2m1", PerGroup(32), name="blocks.0.fc.weight"), weight)


@pytest.mark.parametrize("granularity", [PerAxis(1), PerToken()], ids=str)
def test_granularities_that_weights_do_not_have(granularity: Granularity) -> None:
    with pytest.raises(
        ValueError, match=r"fc\.weight: granularity .*; a weight takes PerTensor, PerAxis\(0\) or PerGroup"
    ):
        WeightObserver("e2m1", granularity, name="fc.weight")(normal(8, 64))


# --- choosing a format by its output error ---------------------------------------------------------------------------


def bell(seed: int) -> Tensor:
    return normal(16, 64, seed=seed)


def uniform(seed: int) -> Tensor:
    return torch.rand(16, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def outliers(seed: int) -> Tensor:
    return normal(16, 64, seed=seed) ** 7


@pytest.mark.parametrize("kind", [bell, uniform, outliers])
@pytest.mark.parametrize("seed", range(3))
def test_resolve_takes_the_least_output_error(kind: Callable[[int], Tensor], seed: int) -> None:
    """||(W - W^) X^T||^2 over explicit inputs with very different features, every candidate by brute force."""
    weight = kind(seed)
    x = normal(50, 64, seed=100 + seed) * torch.logspace(-2, 1, 64)
    candidates = ["e1m2", "e2m1", "e3m0"]
    errors = []
    for name in candidates:
        groups = weight.double().reshape(16, 2, 32)
        scale = groups.abs().amax(-1, keepdim=True) / parse(name).lattice_max
        rounded = nearest(groups.numpy(), scale.expand_as(groups).numpy(), name).reshape(16, 64)
        errors.append(float((((weight.double().numpy() - rounded) @ x.double().numpy().T) ** 2).sum()))
    observer = WeightObserver(candidates, PerGroup(32))
    observer(weight)
    assert not observer.resolved
    observer.resolve(weight, x.T @ x)
    assert observer.resolved
    assert observer.fmt == parse(candidates[int(np.argmin(errors))])
    single = WeightObserver(observer.fmt, PerGroup(32))
    assert torch.equal(observer.dequantized(weight), single.dequantized(weight)), "the scale is the chosen format's"
    observer.resolve(weight, None)


def test_shapes_of_weights_choose_their_format() -> None:
    chosen = {}
    for kind in (bell, uniform, outliers):
        observer = WeightObserver(["e1m2", "e2m1", "e3m0"], PerGroup(32))
        observer.resolve(kind(0), torch.eye(64))
        chosen[kind.__name__] = str(observer.fmt)
    assert chosen == {"uniform": "e1m2", "bell": "e2m1", "outliers": "e3m0"}


def test_resolve_without_data_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"fc\.weight: choosing a weight format needs data; run calibrate"):
        WeightObserver(["e2m1", "e3m0"], PerGroup(32), name="fc.weight").resolve(normal(8, 64), None)


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 2, 3, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_token_has_its_own_scale(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spread = torch.logspace(-3, 3, shape[-2])[:, None] if len(shape) > 1 else 1
    x = (normal(*shape) * spread).to(dtype)
    observer = TokenActivationObserver("e2m3")
    assert observer(x) is x
    observer.fake_quantize = True
    found = observer(x)
    assert found.dtype == dtype
    scale = (x.float().abs().amax(-1, keepdim=True) / 60).expand(shape).double().numpy()
    expected = torch.from_numpy(nearest(x.double().numpy(), scale, "e2m3")).to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0)


def test_a_static_range_is_the_largest_magnitude_seen() -> None:
    observer = StaticActivationObserver("e2m3", name="fc.input")
    for x in (torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 2.5]])):
        assert observer(x) is x
    assert observer.absmax == 3
    observer.fake_quantize = True
    found = observer(torch.tensor([[60.0, 0.05, -0.02]]))
    assert torch.allclose(found, torch.tensor([[3.0, 0.05, 0.0]])), "beyond it, values saturate"
    assert observer.absmax == 3, "while it quantizes, it does not observe"


def test_a_static_range_without_data_is_refused() -> None:
    observer = StaticActivationObserver("e2m3", name="blocks.0.fc.input")
    observer.fake_quantize = True
    with pytest.raises(RuntimeError, match=r"static range at blocks\.0\.fc\.input saw no data; run calibrate"):
        observer(normal(2, 4))


def test_a_static_range_that_saw_only_zeros_is_data() -> None:
    observer = StaticActivationObserver("e2m3")
    observer(torch.zeros(2, 4))
    observer.fake_quantize = True
    assert torch.equal(observer(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", [TokenActivationObserver, StaticActivationObserver])
def test_activations_that_are_not_numbers_are_refused_by_name_and_shape(kind: type) -> None:
    x = normal(2, 4)
    x[0, 1] = torch.inf
    with pytest.raises(
        ValueError, match=r"calibration data at fc\.input of shape \(2, 4\) holds 1 NaN or Inf of 8 values"
    ):
        kind("e2m3", name="fc.input")(x)


@pytest.mark.parametrize("kind", [TokenActivationObserver, StaticActivationObserver])
def test_the_gram_matrix_sums_over_all_tokens(kind: type) -> None:
    first, second = normal(2, 3, 8), normal(4, 5, 8, seed=1)
    observer = kind("e2m3", collect_gram=True)
    observer(first)
    observer(second)
    rows = torch.cat([first.flatten(0, 1), second.flatten(0, 1)]).double()
    torch.testing.assert_close(observer.gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)
    assert kind("e2m3")(first) is first and kind("e2m3").gram is None


@pytest.mark.parametrize("kind", [TokenActivationObserver, StaticActivationObserver])
def test_the_gradient_goes_straight_through(kind: type) -> None:
    x = normal(2, 3, 8).requires_grad_()
    observer = kind("e2m3")
    observer(x)
    observer.fake_quantize = True
    (observer(x) * torch.arange(8)).sum().backward()
    assert torch.equal(x.grad, torch.arange(8.0).expand(2, 3, 8))


# --- as torchao's observers ------------------------------------------------------------------------------------------


def test_with_args_makes_a_new_observer_each_time() -> None:
    make = WeightObserver.with_args(
        fmt="e2m1", granularity=PerGroup(32), search="mse", scale_dtype=torch.float16, name="w"
    )
    first, second = make(), make()
    assert first is not second
    assert (str(first.fmt), first.search, first.scale_dtype, first.name) == ("e2m1", "mse", torch.float16, "w")
    for kind in (TokenActivationObserver, StaticActivationObserver):
        assert kind.with_args(fmt="e3m4", name="x")().name == "x"


def test_calculate_qparams_says_whom_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"WeightObserver emits its own .*; call convert\(model, node\)"):
        WeightObserver("e2m1").calculate_qparams()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 8)
        with torch.no_grad():
            self.fc.weight.copy_(normal(8, 64))
            self.fc.bias.copy_(normal(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class MinimalQuantizer(Quantizer):
    """Annotates every linear's weight and input with two given observers: nothing of FP4DiTQuantizer takes part."""

    def __init__(self, weight: Any, activation: Any):
        self.weight, self.activation = weight, activation

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                x, weight = node.args[:2]
                specs = {
                    source: QuantizationSpec(dtype=torch.uint8, observer_or_fake_quant_ctr=observer)
                    for source, observer in ((x, self.activation), (weight, self.weight))
                }
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


def prepare(weight: Any, activation: Any) -> torch.fx.GraphModule:
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(Linear(), (normal(2, 3, 64),), dynamic_shapes=({0: auto, 1: auto},))
    prepared = prepare_pt2e(exported.module(check_guards=False), MinimalQuantizer(weight, activation))
    prepared(normal(2, 3, 64, seed=2))
    return prepared


WEIGHT = WeightObserver.with_args(fmt="e2m1", granularity=PerGroup(32), name="fc.weight")
CANDIDATES = WeightObserver.with_args(fmt=["e1m2", "e3m0"], granularity=PerAxis(0), search="mse", name="fc.weight")
FLOAT16 = WeightObserver.with_args(fmt="int4", granularity=PerTensor(), scale_dtype=torch.float16, name="fc.weight")
TOKEN = TokenActivationObserver.with_args(fmt="e2m3", name="fc.input", collect_gram=True)
STATIC = StaticActivationObserver.with_args(fmt="e2m3", name="fc.input", collect_gram=True)


@pytest.mark.parametrize("activation", [TOKEN, STATIC], ids=["token", "static"])
@pytest.mark.parametrize("weight", [WEIGHT, CANDIDATES, FLOAT16], ids=["group", "candidates", "tensor float16"])
def test_the_converted_graph_computes_what_fake_quantization_did(weight: Any, activation: Any) -> None:
    prepared = prepare(weight, activation)
    samples = [normal(2, 3, 64), normal(5, 1, 64, seed=3)]
    observing = [Linear()(x) for x in samples]
    assert all(torch.equal(prepared(x), y) for x, y in zip(samples, observing, strict=True))
    converted = convert_pt2e(copy.deepcopy(prepared))

    for module in prepared.modules():
        if isinstance(module, WeightObserver) and not module.resolved:
            gram = next(m.gram for m in prepared.modules() if getattr(m, "gram", None) is not None)
            module.resolve(Linear().fc.weight.detach(), gram)
    set_fake_quantize(prepared, weight=True, activation=True)
    expected = [prepared(x) for x in samples]
    assert all(torch.equal(converted(x), y) for x, y in zip(samples, expected, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(observing, expected, strict=True))

    set_fake_quantize(prepared, weight=False, activation=False, paused=True)
    assert all(torch.equal(prepared(x), y) for x, y in zip(samples, observing, strict=True))


def test_converting_before_calibrating_a_static_range_is_refused() -> None:
    prepared = prepare(WEIGHT, STATIC)
    for module in prepared.modules():
        if isinstance(module, StaticActivationObserver):
            module.absmax.fill_(-1)
    with pytest.raises(RuntimeError, match=r"static range at fc\.input saw no data"):
        convert_pt2e(prepared)


class TestConvertedGraphs(TestCase):
    maxDiff = None

    def test_prepared(self) -> None:
        self.assertExpectedInline(
            show(prepare(WEIGHT, TOKEN)),
            """\
fc_weight = self.fc.weight
activation_post_process_1 = activation_post_process_1(fc_weight)
fc_bias = self.fc.bias
activation_post_process_0 = activation_post_process_0(x)
linear = linear(activation_post_process_0, activation_post_process_1, fc_bias)
return (linear,)""",
        )

    def test_token_wise(self) -> None:
        converted = convert_pt2e(prepare(WEIGHT, TOKEN))
        self.assertExpectedInline(
            show(converted),
            """\
fc_weight_codes = self.fc.weight_codes
fc_weight_scale = self.fc.weight_scale
dequantize_default = fp4dit_ao.dequantize(fc_weight_codes, [1, 32], fc_weight_scale, e2m1, torch.float32)
fc_bias = self.fc.bias
choose_scale_default = fp4dit_ao.choose_scale(x, [1, 1, -1], e2m3, torch.float32)
quantize_default = fp4dit_ao.quantize(x, [1, 1, -1], choose_scale_default, e2m3)
dequantize_default_1 = fp4dit_ao.dequantize(quantize_default, [1, 1, -1], choose_scale_default, e2m3, torch.float32)
linear = linear(dequantize_default_1, dequantize_default, fc_bias)
return (linear,)""",
        )
        state = [
            f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for name, x in converted.state_dict().items()
        ]
        self.assertExpectedInline(
            "\n".join(sorted(state)),
            """\
fc.bias float32[8]
fc.weight_codes uint8[8, 64]
fc.weight_scale float32[8, 2]""",
        )

    def test_static(self) -> None:
        self.assertExpectedInline(
            show(convert_pt2e(prepare(FLOAT16, STATIC))),
            """\
fc_weight_codes = self.fc.weight_codes
fc_weight_scale = self.fc.weight_scale
dequantize_default = fp4dit_ao.dequantize(fc_weight_codes, [-1, -1], fc_weight_scale, e0m3, torch.float32)
fc_bias = self.fc.bias
fc_input_scale = self.fc.input_scale
quantize_default = fp4dit_ao.quantize(x, [-1, -1, -1], fc_input_scale, e2m3)
dequantize_default_1 = fp4dit_ao.dequantize(quantize_default, [-1, -1, -1], fc_input_scale, e2m3, torch.float32)
linear = linear(dequantize_default_1, dequantize_default, fc_bias)
return (linear,)""",
        )

    def test_the_best_of_several_formats(self) -> None:
        self.assertExpectedInline(
            show(convert_pt2e(prepare(CANDIDATES, TOKEN))),
            """\
fc_weight_codes = self.fc.weight_codes
fc_weight_scale = self.fc.weight_scale
dequantize_default = fp4dit_ao.dequantize(fc_weight_codes, [1, -1], fc_weight_scale, e1m2, torch.float32)
fc_bias = self.fc.bias
choose_scale_default = fp4dit_ao.choose_scale(x, [1, 1, -1], e2m3, torch.float32)
quantize_default = fp4dit_ao.quantize(x, [1, 1, -1], choose_scale_default, e2m3)
dequantize_default_1 = fp4dit_ao.dequantize(quantize_default, [1, 1, -1], choose_scale_default, e2m3, torch.float32)
linear = linear(dequantize_default_1, dequantize_default, fc_bias)
return (linear,)""",
        )
