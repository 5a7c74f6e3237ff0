"""Ranges by timestep: the graph, the scales they stand for, the nearest timestep, rounding, files, refusals."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import (
    FP4DiTQuantizer,
    QuantizedTransformer,
    ReconstructionConfig,
    calibrate,
    capture,
    example_inputs,
    lower,
    quantizer_for,
    reconstruct,
    transform,
)
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.transforms.timestep_ranges import TimestepRanges
from tests.graphs import show
from tests.passes.transforms.layers import relative

STATIC = replace(RECIPES["w4a6_static"](), pre_gelu_weight=None, attention=None, skip=())
SIZES = {900.0: 1.0, 500.0: 6.0, 100.0: 40.0}
"""Largest magnitudes by timestep."""


class Timed(nn.Module):
    """Two projections of inputs whose size depends on the timestep; their sum passes a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(128, 32), nn.Linear(128, 32, bias=False)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return nn.functional.gelu(self.one(x)) + self.two(x) + timestep[:, None, None] * 1e-3


def at(time: float, seed: int = 0, size: float | None = None) -> dict[str, Tensor]:
    x = torch.randn(2, 24, 128, generator=torch.Generator().manual_seed(seed + int(time))).clamp(-3, 3)
    return {"x": x / x.abs().max() * (size or SIZES[time]), "timestep": torch.full((2,), time)}


@pytest.fixture(scope="module")
def model() -> Timed:
    torch.manual_seed(0)
    return Timed().eval()


@torch.no_grad()
def test_the_graph_divides_before_and_multiplies_behind_linears(model: Timed) -> None:
    samples = [at(time) for time in SIZES]
    method = TimestepRanges()
    graph = transform(capture(model, samples[0]), samples, [method], STATIC, progress=False)
    lines = show(graph).splitlines()
    assert lines[3 : lines.index("add = add.Tensor(gelu, mul_tensor_1)")] == [
        "calibrated_timesteps = self.calibrated_timesteps",
        "reshape_default = reshape(timestep, [-1, 1])",
        "sub_tensor = sub.Tensor(reshape_default, calibrated_timesteps)",
        "abs_default = abs(sub_tensor)",
        "argmin_default = argmin(abs_default, -1)",
        "one_timestep_ranges = self.one.timestep_ranges",
        "index_select_default = index_select(one_timestep_ranges, 0, argmin_default)",
        "view_default = view(index_select_default, [-1, 1, 1])",
        "div_tensor = div.Tensor(x, view_default)",
        "linear = linear(div_tensor, one_weight)",
        "mul_tensor = mul.Tensor(linear, view_default)",
        "add_tensor = add.Tensor(mul_tensor, one_bias)",
        "gelu = gelu(add_tensor)",
        "linear_1 = linear(div_tensor, two_weight)",
        "mul_tensor_1 = mul.Tensor(linear_1, view_default)",
    ]
    np.testing.assert_array_equal(graph.get_buffer("calibrated_timesteps").numpy(), [100, 500, 900])
    wanted = torch.tensor([40.0, 6.0, 1.0]).div(40).bfloat16().float()
    assert torch.equal(graph.get_buffer("one.timestep_ranges"), wanted)
    for sample in (*samples, at(480.0, size=9.0)):
        assert relative(graph(**sample), model(**sample)) < 1e-6
    mixed = {name: torch.cat([samples[0][name], samples[2][name]]) for name in samples[0]}
    assert relative(graph(**mixed), model(**mixed)) < 1e-6
    fresh = capture(model, samples[0])
    TimestepRanges.from_record(method.to_record()).apply(fresh)
    assert relative(fresh(**mixed), model(**mixed)) < 1e-6, "divides by ones, until the stored ranges come"


@torch.no_grad()
def test_each_timestep_has_a_scale_of_its_own(model: Timed) -> None:
    """The quantized graph's linears, computed in NumPy from the definition of a static range."""
    samples = [at(time) for time in SIZES]
    quantizer = FP4DiTQuantizer().set_global(STATIC)
    graph = transform(capture(model, samples[0]), samples, [TimestepRanges()], quantizer, progress=False)
    prepared = prepare_pt2e(graph, quantizer)
    calibrate(prepared, samples, progress=False)
    lowered = lower(convert_pt2e(prepared, fold_quantize=False))
    levels = np.array(list(range(8)) + [m * 2**e for e in range(3) for m in range(8, 16)], float)  # E2M3, 0 to 60
    levels = np.unique(np.concatenate([levels, -levels]))
    weights = {name: lowered.get_parameter(f"{name}.weight").dequantize().numpy() for name in ("one", "two")}
    ranges = dict(zip(SIZES, torch.tensor([1.0, 6, 40]).div(40).bfloat16().tolist(), strict=True))
    scale = max(float(s["x"].abs().max()) / ranges[t] for t, s in zip(SIZES, samples, strict=True)) / 60
    for time, nearest in ((900.0, 900.0), (100.0, 100.0), (310.0, 500.0), (290.0, 100.0), (999.0, 900.0)):
        sample = at(time, seed=5, size=SIZES[nearest])
        step = scale * ranges[nearest]
        x = sample["x"].numpy()
        rounded = levels[np.abs(x[..., None] / step - levels).argmin(-1)] * step
        one = torch.tensor(rounded @ weights["one"].T + model.one.bias.numpy())
        wanted = nn.functional.gelu(one) + torch.tensor(rounded @ weights["two"].T) + time * 1e-3
        assert relative(lowered(**sample), wanted) < 2e-3, f"{time}: some ties aside"
    plain = prepare_pt2e(capture(model, samples[0]), quantizer)
    calibrate(plain, samples, progress=False)
    one_range = lower(convert_pt2e(plain, fold_quantize=False))
    small = at(900.0, seed=5)
    assert relative(lowered(**small), model(**small)) < relative(one_range(**small), model(**small)) / 2


def test_what_reaches_a_gate_is_still_found(model: Timed) -> None:
    samples = [at(time) for time in SIZES]
    config = replace(STATIC, pre_gelu_weight="e3m0")
    quantizer = FP4DiTQuantizer().set_global(config)
    graph = transform(capture(model, samples[0]), samples, [TimestepRanges()], quantizer, progress=False)
    prepare_pt2e(graph, quantizer)
    assert {name: d.config.weight for name, d in quantizer.decisions.items() if d.config} == {
        "one": "e3m0",
        "two": "e2m1",
    }


@pytest.mark.parametrize("rounding", ["gptq", "scale_aware"])
def test_rounding_sees_ranges_row_by_row(model: Timed, rounding: str) -> None:
    samples = [at(time) for time in SIZES]
    quantizer = FP4DiTQuantizer().set_global(STATIC)
    graph = transform(capture(model, samples[0]), samples, [TimestepRanges()], quantizer, progress=False)
    prepared = prepare_pt2e(graph, quantizer)
    calibrate(prepared, samples, progress=False)
    rows = reconstruct(
        prepared, samples, ReconstructionConfig(rounding, scope="layer", iters=30, batch_size=4), progress=False
    ).rows
    assert sum(row.loss_after for row in rows) < sum(row.loss_before for row in rows)


@torch.no_grad()
def test_files_come_back_as_graphs_with_the_same_bits(tmp_path: Path) -> None:
    model = small_model("PixArt-Σ")
    samples = [example_inputs(model, seed=seed) for seed in range(2)]
    assert samples[0]["timestep"][0] != samples[1]["timestep"][0]
    quantizer = quantizer_for(model, "w4a6_static")
    method = TimestepRanges()
    graph = transform(capture(model, samples[0]), samples, [method], quantizer, progress=False)
    assert len(method.groups) > 4
    prepared = prepare_pt2e(graph, quantizer)
    calibrate(prepared, samples, progress=False)
    lowered = lower(convert_pt2e(prepared, fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    whole = QuantizedTransformer(lowered, model, sample_description.describe(bind(model, samples[0])), decisions)
    whole.save_pretrained(tmp_path / "saved")
    loaded = load_graph(tmp_path / "saved")
    for sample in samples:
        assert torch.equal(loaded(**sample, return_dict=False)[0], whole(**sample, return_dict=False)[0])
    with pytest.raises(ValueError, match=r"input ranges by timestep, which its modules do not know|static|calibrat"):
        load_modules(tmp_path / "saved")
    with pytest.raises(ValueError, match="input ranges by timestep, which its modules do not know; load it as a graph"):
        method.apply_to_modules(model)


def test_refusals(model: Timed) -> None:
    samples = [at(time) for time in SIZES]
    graph = capture(model, samples[0])
    with pytest.raises(ValueError, match=r"inputs with a static range, and here none has one.* such as w4a6_static"):
        transform(graph, samples, ["timestep_ranges"], RECIPES["w4a6"](), progress=False)
    with pytest.raises(ValueError, match=r"a tensor named timestep or timesteps or t; found x; see collect_samples"):
        transform(graph, [{"x": samples[0]["x"]}], ["timestep_ranges"], STATIC, progress=False)
    two = samples[0] | {"timestep": torch.tensor([1.0, 2.0])}
    with pytest.raises(ValueError, match="needs one timestep for all rows of a sample"):
        transform(graph, [two], ["timestep_ranges"], STATIC, progress=False)
    with pytest.raises(ValueError, match="is empty"):
        TimestepRanges.from_record({"argument": "timestep", "timesteps": [], "groups": []})
