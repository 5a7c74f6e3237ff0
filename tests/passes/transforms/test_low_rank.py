"""Low-rank branches: the split by NumPy, the function that stays, full rank, errors that fall, files."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import (
    AdaRoundConfig,
    FP4DiTQuantizer,
    capture,
    example_inputs,
    lower,
    quantizer_for,
    reconstruct,
    transform,
)
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline
from fp4dit_ao.passes.transforms.hadamard import Hadamard
from fp4dit_ao.passes.transforms.low_rank import LowRank, LowRankLinear, leading_factors
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from tests.graphs import TinyDiT, show, tiny_sample
from tests.passes.transforms.layers import Layer, relative
from tests.passes.transforms.test_hadamard import quantized

E2M1 = replace(RECIPES["w4a6_e2m1"](), skip=())


def layer_and_samples(seed: int = 0, count: int = 2) -> tuple[Layer, list[dict[str, Tensor]]]:
    """Weights with a few strong directions, and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    model = Layer().eval()
    strong = torch.randn(128, 4, generator=generator)
    for linear in (model.one, model.two):
        noise = torch.randn(32, 128, generator=generator) / 20
        linear.weight.data.copy_(noise + torch.randn(32, 4, generator=generator) @ strong.T / 8)
    mixing = torch.randn(64, 128, generator=generator) / 8
    return model, [{"x": torch.randn(2, 48, 64, generator=generator) @ mixing} for _ in range(count)]


# --- equations, by NumPy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(96, 128), (128, 96), (40, 300)])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_factors_are_the_leading_singular_vectors(rows: int, columns: int, rank: int) -> None:
    generator = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(40)
    left, right = (np.linalg.qr(generator.standard_normal((n, 40)))[0] for n in (rows, columns))
    weight = (left * spectrum) @ right.T
    up, down = leading_factors(torch.tensor(weight).float(), rank)
    assert (up.shape, down.shape) == ((rows, rank), (rank, columns))
    expected = (left[:, :rank] * spectrum[:rank]) @ right[:, :rank].T
    np.testing.assert_allclose((up @ down).numpy(), expected, atol=2e-4)
    again = leading_factors(torch.tensor(weight).float(), rank)
    assert torch.equal(again[0], up)


def to_e2m1(weight: np.ndarray, group: int = 128) -> np.ndarray:
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    both = np.concatenate([-levels[:0:-1], levels])
    blocks = weight.reshape(-1, group)
    scale = np.abs(blocks).max(1, keepdims=True) / 6
    return (both[np.abs((blocks / scale)[..., None] - both).argmin(-1)] * scale).reshape(weight.shape)


@torch.no_grad()
def test_the_split_is_refitted_until_the_output_errs_no_less() -> None:
    """Inputs in high precision; singular vectors, quantization and errors by NumPy in float64."""
    model, samples = layer_and_samples()
    method = LowRank(rank=4, rows=4096)
    config = replace(E2M1, activation=None, attention=None)
    transform(capture(model, samples[0]), samples, [method], config, progress=False)
    x = torch.cat([s["x"].flatten(0, 1) for s in samples]).double().numpy()
    w = torch.cat([model.one.weight, model.two.weight]).double().numpy()
    errors, target = [], w
    while len(errors) < 2 or errors[-1] < errors[-2]:
        u, s, v = np.linalg.svd(target, full_matrices=False)
        low = (u[:, :4] * s[:4]) @ v[:4]
        rounded = to_e2m1(w - low)
        errors.append(np.square(x @ (w - low - rounded).T).sum() / np.square(x @ w.T).sum())
        target = w - rounded
    before, after = method.errors["one"]
    assert before == pytest.approx(np.square(x @ (w - to_e2m1(w)).T).sum() / np.square(x @ w.T).sum(), rel=1e-3)
    assert after == pytest.approx(min(errors), rel=0.03)
    assert after < before / 2


@pytest.mark.parametrize("recipe", ["w4a6_e2m1", "int_w4a6", "w4a6_codebook", "nvfp4"])
@torch.no_grad()
def test_full_rank_leaves_nothing_to_quantize(recipe: str) -> None:
    model, samples = layer_and_samples()
    config = replace(RECIPES[recipe](), skip=())
    method = LowRank(rank=1000)
    graph = transform(capture(model, samples[0]), samples, [method], config, progress=False)
    assert method.groups[0].rank == 64, "two linears of 32 outputs"
    assert relative(quantized(graph, config, samples[0])(**samples[0]), model(**samples[0])) < 2e-6


# --- the graph -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_linears_that_share_an_input_share_the_first_product() -> None:
    model, samples = layer_and_samples()
    weight = model.one.weight.clone()
    graph = transform(capture(model, samples[0]), samples, [LowRank(rank=4)], E2M1, progress=False)
    assert [line for line in show(graph).splitlines() if not line.endswith((".bias", ".weight"))] == [
        "one_low_rank_down = self.one.low_rank_down",
        "matmul_default = matmul(x, one_low_rank_down)",
        "linear = linear(x, one_weight, one_bias)",
        "one_low_rank_up = self.one.low_rank_up",
        "matmul_default_1 = matmul(matmul_default, one_low_rank_up)",
        "add_tensor = add.Tensor(linear, matmul_default_1)",
        "linear_1 = linear(x, two_weight, two_bias)",
        "two_low_rank_up = self.two.low_rank_up",
        "matmul_default_2 = matmul(matmul_default, two_low_rank_up)",
        "add_tensor_1 = add.Tensor(linear_1, matmul_default_2)",
        "sub = sub.Tensor(add_tensor, add_tensor_1)",
        "return (sub,)",
    ]
    assert torch.equal(model.one.weight, weight), "the model that was captured stays as it is"
    assert relative(graph(**samples[1]), model(**samples[1])) < 2e-6
    fresh = capture(model, samples[0])
    LowRank.from_record({k: v for k, v in graph.meta["fp4dit_ao_transforms"][0].items() if k != "name"}).apply(fresh)
    assert relative(fresh(**samples[1]), model(**samples[1])) < 1e-6
    assert [name for name, _ in fresh.named_buffers()] == [name for name, _ in graph.named_buffers()]


@torch.no_grad()
def test_blocks_stay_alike_and_formats_before_gates_stay() -> None:
    config = replace(RECIPES["w4a6"](), skip=("p*",))
    assert config.pre_gelu_weight == "e3m0"
    sample = tiny_sample(tokens=16)
    graph = capture(TinyDiT(layers=2).eval(), sample)
    transform(graph, [sample], [LowRank(rank=2)], config, progress=False)
    lowered = quantized(graph, config, sample)
    assert list(kinds_of_blocks(outline(lowered))) == ["block_0"]
    assert lowered.get_parameter("blocks.0.ff.up.weight").fmt == "e3m0"
    assert lowered.get_parameter("blocks.0.ff.down.weight").fmt == "e2m1"


@torch.no_grad()
def test_a_weight_that_is_used_twice_has_one_branch() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.gelu(self.fc(x)))

    torch.manual_seed(0)
    model, (sample, _) = Twice().eval(), layer_and_samples()[1]
    graph = transform(capture(model, sample), [sample], [LowRank(rank=4)], E2M1, progress=False)
    assert sorted(name for name, _ in graph.named_buffers()) == ["fc.low_rank_down", "fc.low_rank_up"]
    assert relative(graph(**sample), model(**sample)) < 2e-6


# --- what it is good for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        ("w4a6_e2m1", 1.5), ("w4a6_nf4", 1.5), ("int_w4a6", 1.5), ("w4a6_auto", 1.5), ("w4a6_codebook", 1.5),
        ("nvfp4", 1.15), ("mxfp4", 1.15),
    ],
)  # fmt: skip
@torch.no_grad()
def test_held_out_error_falls(recipe: str, factor: float, seed: int) -> None:
    model, samples = layer_and_samples(seed, 3)
    config = replace(RECIPES[recipe](), skip=())
    expected = model(**samples[2])
    errors = []
    for transforms in ([], [LowRank(rank=8)]):
        graph = transform(capture(model, samples[0]), samples[:2], transforms, config, progress=False)
        errors.append(relative(quantized(graph, config, samples[0])(**samples[2]), expected))
    assert errors[1] < errors[0] / factor


@torch.no_grad()
def test_behind_other_transforms_and_in_half_precision() -> None:
    model, samples = layer_and_samples()
    expected = model(**samples[1])
    methods = [SmoothQuant(points=2), LowRank(rank=4), Hadamard(everywhere=True)]
    graph = transform(capture(model, samples[0]), samples[:1], methods, E2M1, progress=False)
    assert relative(graph(**samples[1]), expected) < 2e-6
    half, inputs = copy.deepcopy(model).bfloat16(), [{"x": s["x"].bfloat16()} for s in samples]
    graph = transform(capture(half, inputs[0]), inputs, [LowRank(rank=4)], E2M1, progress=False)
    assert graph.get_buffer("one.low_rank_up").dtype == torch.bfloat16
    assert relative(graph(**inputs[1]).float(), expected) < 4 * 2**-8


def test_rounding_is_learned_on_the_residual() -> None:
    model, samples = layer_and_samples()
    graph = transform(capture(model, samples[0]), samples, [LowRank(rank=4)], E2M1, progress=False)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(E2M1))
    [row] = reconstruct(prepared, samples, AdaRoundConfig(iters=50, batch_size=4), progress=False).rows
    assert row.loss_after < row.loss_before


# --- both forms, and files -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_modules_and_files_compute_the_same_bits(tmp_path: Path) -> None:
    from fp4dit_ao import QuantizedTransformer, export_single_file
    from fp4dit_ao.checkpoint import graph_rebuilding
    from fp4dit_ao.diffusers_integration.graph_form import load_graph
    from fp4dit_ao.diffusers_integration.module_conversion import load_modules
    from fp4dit_ao.diffusers_integration.module_form import dequantize_modules
    from fp4dit_ao.diffusers_integration.named_models import size_at_16_bits
    from fp4dit_ao.graph_capture import sample_description
    from fp4dit_ao.graph_capture.capturing import bind

    model = small_model("PixArt-Σ")
    sample = example_inputs(model)
    quantizer = quantizer_for(model, "w4a6")
    methods = [SmoothQuant(points=1, rows=16), LowRank(rank=4, rounds=1, rows=16), Hadamard(rows=16, everywhere=True)]
    graph = transform(capture(model, sample), [sample], methods, quantizer, progress=False)
    lowered = lower(convert_pt2e(prepare_pt2e(graph, quantizer), fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    whole = QuantizedTransformer(lowered, model, sample_description.describe(bind(model, sample)), decisions)
    whole.save_pretrained(tmp_path / "branched")
    expected = whole(**sample, return_dict=False)[0]
    modules = load_modules(tmp_path / "branched")
    name = methods[1].groups[0].linears[0]
    assert {"low_rank_down", "low_rank_up", "rotation"} <= {
        name for name, _ in modules.get_submodule(name).named_buffers()
    }
    for form in (load_graph(tmp_path / "branched"), modules):
        assert torch.equal(form(**sample, return_dict=False)[0], expected)
    rows = [row for row in whole.summary() if row.kind == "linear" and row.quantized]
    beside = {x.data_ptr(): x.numel() for row in rows for x in modules.get_submodule(row.name).buffers()}
    bits = sum(8 * row.bytes for row in rows) + 16 * sum(beside.values())  # linears that share an input share tensors
    assert size_at_16_bits(whole)[1] == pytest.approx(bits / sum(math.prod(row.shape or ()) for row in rows))
    modules.save_pretrained(tmp_path / "again")
    assert torch.equal(load_graph(tmp_path / "again")(**sample, return_dict=False)[0], expected)
    plain = dequantize_modules(modules)
    assert relative(plain.get_submodule(name).weight, model.get_submodule(name).weight) < 0.2
    with pytest.raises(ValueError, match=r"was changed by the transform 'low_rank', which layout .* cannot describe"):
        export_single_file(tmp_path / "branched", tmp_path / "one.safetensors")


@torch.no_grad()
def test_dequantized_modules_are_plain_again() -> None:
    from fp4dit_ao.passes.transforms.transformed_linear import restore_linears

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    x, down, up = torch.randn(5, 32), torch.randn(32, 3), torch.randn(3, 16)
    model[0] = LowRankLinear(model[0], down, up)
    expected = model(x)
    restore_linears(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, samples = layer_and_samples()
    graph = capture(model, samples[0])
    with pytest.raises(ValueError, match="LowRank needs to know the formats"):
        LowRank().fit(graph, samples)
    for wrong in ({"rank": 0}, {"rounds": -1}, {"rows": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            LowRank(**wrong)
    transform(graph, samples, ["low_rank"], E2M1, progress=False)
    with pytest.raises(ValueError, match=r"already: it has one\.low_rank_down; apply low_rank once"):
        transform(graph, samples, ["low_rank"], E2M1, progress=False)
    record = {"groups": [{"linears": ["three"], "rank": 4}]}
    with pytest.raises(ValueError, match="no linear three, which was given a low-rank branch; it is of another model"):
        LowRank.from_record(record).apply(capture(model, samples[0]))
    with pytest.raises(ValueError, match="Layer has no linear three, which was given a low-rank branch"):
        LowRank.from_record(record).apply_to_modules(model)
    with pytest.raises(ValueError, match="is empty"):
        LowRank.from_record({"groups": [{"linears": [], "rank": 4}]})
