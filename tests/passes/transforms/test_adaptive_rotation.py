"""Adaptive rotation: which linears get which rotation, the matrices and the order, the function that stays, files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import QuantizedTransformer, capture, example_inputs, lower, quantizer_for, transform
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.diffusers_integration.module_form import dequantize_modules
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.transforms.adaptive_rotation import AdaptiveRotation
from fp4dit_ao.passes.transforms.dual_rotation import dealt_order, dual_rotation, greedy_rotation, spreading_rotation
from fp4dit_ao.passes.transforms.hadamard import rotate, rotation
from fp4dit_ao.passes.transforms.principal_components import PrincipalComponents
from tests.graphs import show
from tests.passes.transforms.layers import Layer, quantized, relative

INT4 = replace(RECIPES["int_w4a4"](), skip=())


def massive(seed: int = 0, size: float = 300.0) -> tuple[Layer, list[dict[str, Tensor]]]:
    """Three channels of some tokens hold nearly all of the inputs' energy."""
    generator = torch.Generator().manual_seed(seed)
    samples = [{"x": torch.randn(2, 32, 128, generator=generator)} for _ in range(2)]
    for sample in samples:
        sample["x"][..., [3, 70, 71]] += size * torch.rand(2, 32, 3, generator=generator)
    return Layer().eval(), samples


# --- the fitted rotations --------------------------------------------------------------------------------------------


def test_simple_rotations_are_orthogonal_and_keep_the_first_column_even() -> None:
    matrix = spreading_rotation(32, seed=4).double()
    np.testing.assert_allclose(matrix.numpy() @ matrix.numpy().T, np.eye(32), atol=1e-6)
    np.testing.assert_allclose(matrix[:, 0].numpy(), 32**-0.5, rtol=1e-6)
    assert not torch.equal(matrix, spreading_rotation(32, seed=5).double())


def test_rotations_are_the_product_that_leaves_the_smallest_peak() -> None:
    """Each step of the search, once more, in NumPy, from its definition."""
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    rows[:, 5] *= 50
    simple = spreading_rotation(16, 1).double().numpy()
    x, product = rows.double().numpy().reshape(-1, 16), np.eye(16)
    tried = [(np.abs(x).max(), product)]
    for _ in range(7):
        outlier = np.abs(x).max(0).argmax()
        swap = np.eye(16)
        swap[[0, outlier]] = swap[[outlier, 0]]
        x, product = x @ swap @ simple @ swap, product @ swap @ simple @ swap
        tried.append((np.abs(x).max(), product))
    found = greedy_rotation(rows, 16, steps=7, seed=1)
    np.testing.assert_allclose(found.numpy(), min(tried, key=lambda each: each[0])[1], atol=1e-5)
    np.testing.assert_allclose(found.numpy() @ found.numpy().T, np.eye(16), atol=1e-5)
    assert float(rotate(rows, found).abs().max()) < 0.5 * float(rows.abs().max())


def test_channels_are_dealt_out_to_and_fro() -> None:
    size = torch.tensor([10.0, 70, 30, 50, 20, 80, 60, 40])
    assert dealt_order(size, 4).tolist() == [5, 3, 7, 0, 1, 6, 2, 4]  # 80, 50, 40, 10 and 70, 60, 30, 20
    shares = size[dealt_order(size, 4)].reshape(2, 4).sum(1)
    assert shares.tolist() == [180, 180]


def test_blocks_have_like_peaks_afterwards() -> None:
    _, samples = massive()
    rows = samples[0]["x"].flatten(0, 1)
    dual = dual_rotation(rows, 32, 64)
    out = rotate(rotate(rows, dual.first)[:, dual.order], dual.second)
    assert sorted(dual.order.tolist()) == list(range(128))
    torch.testing.assert_close(out.norm(dim=1), rows.norm(dim=1), rtol=1e-4, atol=0)
    once = rotate(rows, dual.first)
    peaks = [x.abs().amax(0).unflatten(0, (4, 32)).amax(1) for x in (once, out)]
    assert float(peaks[1].max() / peaks[1].min()) < 0.5 * float(peaks[0].max() / peaks[0].min())
    assert float(out.abs().max()) <= float(once.abs().max())


# --- the graph -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_inputs_root_mean_square_decides() -> None:
    for size, steps in ((0.0, ["matmul"]), (300.0, ["matmul", "index_select", "matmul_1"])):
        model, samples = massive(size=size)
        samples[0]["x"] *= 0.9
        method = AdaptiveRotation(steps=16, everywhere=True)
        graph = transform(capture(model, samples[0]), samples[:1], [method], INT4, progress=False)
        [(name, fluctuation)] = method.fluctuation.items()
        x = samples[0]["x"].numpy()
        assert name == "one"
        assert fluctuation == pytest.approx(np.sqrt((x**2).sum() / x.size), rel=1e-5)
        text = show(graph)
        assert (fluctuation >= 1) == ("index_select" in text) == ("second_rotation" in text) == (len(steps) == 3)
        assert relative(graph(**samples[1]), model(**samples[1])) < 4e-6
        if len(steps) == 1:
            assert torch.equal(graph.get_buffer("one.rotation"), rotation(128, 0))
        fresh = capture(model, samples[0])
        AdaptiveRotation.from_record(method.to_record()).apply(fresh)
        assert torch.equal(fresh(**samples[1]), model(**samples[1])), "changes nothing, until stored tensors come"


@torch.no_grad()
def test_in_bfloat16_weights_undo_the_rounding_of_rotations() -> None:
    model, samples = massive(size=20.0)
    half = Layer().bfloat16().eval()
    half.load_state_dict(model.state_dict())
    inputs = {"x": samples[0]["x"].bfloat16()}
    graph = transform(
        capture(half, inputs), [inputs], [AdaptiveRotation(steps=8, everywhere=True)], INT4, progress=False
    )
    wide = {name: x.double() for name, x in graph.named_buffers()}
    weight = {name: x.double() for name, x in graph.named_parameters()}
    x = inputs["x"].double()
    x = rotate(rotate(x, wide["one.rotation"])[..., graph.get_buffer("one.channel_order")], wide["one.second_rotation"])
    found = x @ (weight["one.weight"] - weight["two.weight"]).T + weight["one.bias"] - weight["two.bias"]
    wanted = half.double()(inputs["x"].double())
    assert relative(found, wanted) < 3 * 2**-9, "two roundings of weights to 8 bits, and none of the matrices"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("recipe", ["int_w4a4", "w4a4", "w4a4_codebook", "nvfp4"])
@torch.no_grad()
def test_massive_outliers_lose_their_effect(recipe: str, seed: int) -> None:
    """Judged on other inputs than fitted to, and against a Hadamard matrix; in NVFP4's blocks of 16 it is not chosen."""
    model, samples = massive(seed)
    config = replace(RECIPES[recipe](), skip=())
    expected, errors = model(**samples[1]), []
    for transforms in ([], ["hadamard"], [AdaptiveRotation(steps=64)]):
        graph = transform(capture(model, samples[0]), samples[:1], transforms, config, progress=False)
        errors.append(relative(quantized(graph, config, samples[0])(**samples[1]), expected))
    assert errors[2] <= 1.02 * min(errors[:1] if recipe == "nvfp4" else errors)


@torch.no_grad()
def test_modules_and_files_compute_the_same_bits(tmp_path: Path) -> None:
    """Before principal components, so that those are tested, too."""
    model = small_model("PixArt-Σ")
    sample = example_inputs(model)
    sample["hidden_states"] = sample["hidden_states"] * 4
    quantizer = quantizer_for(model, "w4a4")
    components = PrincipalComponents(rows=64)
    method = AdaptiveRotation(rows=16, steps=4, threshold=0.8, everywhere=True)
    graph = transform(capture(model, sample), [sample], [method, components], quantizer, progress=False)
    assert len(components.groups) > 3
    record = method.to_record()
    assert 0 < len(record["second"]["groups"]) < len(record["first"]["groups"]), "some of each kind"
    lowered = lower(convert_pt2e(prepare_pt2e(graph, quantizer), fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    whole = QuantizedTransformer(lowered, model, sample_description.describe(bind(model, sample)), decisions)
    whole.save_pretrained(tmp_path / "saved")
    expected = whole(**sample, return_dict=False)[0]
    modules = load_modules(tmp_path / "saved")
    for form in (load_graph(tmp_path / "saved"), modules):
        assert torch.equal(form(**sample, return_dict=False)[0], expected)
    modules.save_pretrained(tmp_path / "again")
    assert torch.equal(load_graph(tmp_path / "again")(**sample, return_dict=False)[0], expected)
    name = record["second"]["groups"][0]["linears"][-1]
    original = model.get_parameter(f"{name}.weight")
    rotated = method.float_weight(f"{name}.weight", original, whole.graph)
    assert rotated is not None
    changed = components.float_weight(f"{name}.weight", rotated, whole.graph)
    assert changed is not None
    assert relative(whole.graph.get_parameter(f"{name}.weight").dequantize(), changed) < 0.2
    assert relative(dequantize_modules(modules).get_submodule(name).weight, original) < 0.2


def test_refusals() -> None:
    for wrong in ({"block": 96}, {"threshold": 0}, {"steps": 0}, {"rows": 0}):
        with pytest.raises(ValueError, match=r"must be (a power of two|more than 0|at least 1)"):
            AdaptiveRotation(**wrong)
    model, samples = massive()
    graph = capture(model, samples[0])
    with pytest.raises(ValueError, match="AdaptiveRotation needs to know the formats"):
        AdaptiveRotation().fit(graph, samples)
    empty = {"groups": []}
    record = {"first": {"groups": [{"linears": ["three"], "block": 128}]}, "order": empty, "second": empty}
    with pytest.raises(ValueError, match="no linear three, which was rotated; it is of another model"):
        AdaptiveRotation.from_record(record).apply(graph)
    with pytest.raises(ValueError, match="Layer has no linear three, which was rotated"):
        AdaptiveRotation.from_record(record).apply_to_modules(model)
