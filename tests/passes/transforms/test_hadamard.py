"""Hadamard rotations: the matrix, the function that stays, what is rotated and what is not, errors that fall."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import (
    AdaRoundConfig,
    FP4DiTQuantizer,
    capture,
    example_inputs,
    quantizer_for,
    reconstruct,
    transform,
)
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline
from fp4dit_ao.passes.transforms.hadamard import Hadamard, rotate, rotated_weight, rotation
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from tests.graphs import TinyDiT, show, tiny_sample
from tests.passes.transforms.layers import Layer, quantized, relative

E2M1 = replace(RECIPES["w4a6_e2m1"](), skip=())


def layer_and_sample(seed: int = 0, width: int = 128) -> tuple[Layer, dict[str, Tensor]]:
    """Inputs with three channels of tens of times the others' size."""
    torch.manual_seed(seed)
    x = torch.randn(2, 48, width)
    x[..., [3, 11, 14]] *= torch.tensor([60.0, 25.0, 100.0])
    return Layer(width).eval(), {"x": x}


# --- the matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_the_matrix_is_hadamards_with_signs_and_exact_entries(block: int) -> None:
    matrix = rotation(block, seed=3)
    plain = torch.tensor(scipy.linalg.hadamard(block)).float()
    signs = matrix[:, 0] / matrix[0, 0].abs()
    assert set(signs.tolist()) == {-1.0, 1.0}
    power = matrix[0, 0].abs()
    assert torch.equal(matrix, signs[:, None] * plain * power)
    assert power.log2() == power.log2().round(), "a power of two: the same in every float type"
    gram = matrix.double() @ matrix.double().T
    assert torch.equal(gram, gram[0, 0] * torch.eye(block, dtype=torch.float64))
    assert gram[0, 0] in (1.0, 0.5)
    assert not torch.equal(matrix, rotation(block, seed=4))
    assert torch.equal(matrix, rotation(block, seed=3))


def test_products_are_those_of_the_block_diagonal_matrix() -> None:
    x, weight = torch.randn(5, 7, 96).double(), torch.randn(11, 96)
    matrix = rotation(32)
    wide = scipy.linalg.block_diag(*[matrix.double().numpy()] * 3)
    np.testing.assert_allclose(rotate(x, matrix.double()).numpy(), x.numpy() @ wide, rtol=1e-12)
    changed = rotated_weight(weight, matrix)
    np.testing.assert_allclose(changed.numpy() @ wide.T, weight.numpy(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        rotate(x, matrix.double()) @ changed.double().T, x @ weight.double().T, rtol=0, atol=1e-4
    )


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(128)
    x[17] = 1.0
    assert torch.equal(rotate(x, rotation(128)).abs(), torch.full((128,), 1 / 16))


# --- the graph -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_linears_that_share_an_input_are_given_one_rotation() -> None:
    model, sample = layer_and_sample(width=192)
    weight = model.one.weight.clone()
    config = replace(E2M1, group_size=64)
    graph = transform(capture(model, sample), [sample], [Hadamard(everywhere=True)], config, progress=False)
    assert [line for line in show(graph).splitlines() if not line.endswith(".bias")] == [
        "one_weight = self.one.weight",
        "two_weight = self.two.weight",
        "one_rotation = self.one.rotation",
        "unflatten_int = unflatten.int(x, -1, [3, 64])",
        "matmul_default = matmul(unflatten_int, one_rotation)",
        "flatten_using_ints = flatten.using_ints(matmul_default, -2, -1)",
        "linear = linear(flatten_using_ints, one_weight, one_bias)",
        "linear_1 = linear(flatten_using_ints, two_weight, two_bias)",
        "sub = sub.Tensor(linear, linear_1)",
        "return (sub,)",
    ]
    assert torch.equal(model.one.weight, weight), "the model that was captured stays as it is"
    assert relative(graph(**sample), model(**sample)) < 2e-6
    before = dict(graph.named_parameters())
    again = Hadamard.from_record({k: v for k, v in graph.meta["fp4dit_ao_transforms"][0].items() if k != "name"})
    again.apply(graph)
    assert all(graph.get_parameter(name) is parameter for name, parameter in before.items())
    assert show(graph).count("matmul") == 1 + 2, "one product, one name, one flatten that reads it"


@torch.no_grad()
def test_the_function_of_a_family_stays() -> None:
    model = small_model("Hunyuan-DiT")
    samples = [example_inputs(model, seed=seed) for seed in range(2)]
    graph = capture(model, samples[0])
    expected = graph(**samples[1])[0]
    method = Hadamard(rows=16, everywhere=True)
    transform(graph, samples[:1], [method], quantizer_for(model, "w4a6"), progress=False)
    found = graph(**samples[1])[0]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert not torch.equal(found, expected)
    assert len(method.groups) > 4
    fresh = capture(model, samples[0])
    Hadamard.from_record(method.to_record()).apply(fresh)
    torch.testing.assert_close(fresh(**samples[1])[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_what_gains_nothing_is_not_rotated_and_blocks_stay_alike() -> None:
    torch.manual_seed(0)
    plain, sample = Layer().eval(), {"x": torch.randn(2, 48, 128).sign() * 2}  # every level exact
    method = Hadamard()
    graph = transform(capture(plain, sample), [sample], [method], E2M1, progress=False)
    assert method.groups == []
    assert "matmul" not in show(graph)
    assert method.errors["one"][0] < method.errors["one"][1]
    config = replace(E2M1, skip=("p*",))
    model, tokens = TinyDiT(layers=2).eval(), tiny_sample(tokens=16)
    graph = transform(capture(model, tokens), [tokens], [Hadamard(everywhere=True)], config, progress=False)
    assert list(kinds_of_blocks(outline(quantized(graph, config, tokens)))) == ["block_0"]


@torch.no_grad()
def test_joined_inputs_and_small_widths_are_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(128, 128), nn.Linear(128, 128)
            self.joined, self.odd, self.plain = nn.Linear(256, 24), nn.Linear(24, 128), nn.Linear(128, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.odd(self.joined(torch.cat([self.one(x), self.two(x)], -1))))

    _, sample = layer_and_sample()
    config = replace(E2M1, group_size=8)
    for others in ([], ["split_inputs"]):
        method = Hadamard(everywhere=True)
        transform(capture(Other().eval(), sample), [sample], [*others, method], config, progress=False)
        assert [(group.linears, group.block) for group in method.groups] == [(["one", "two"], 128), (["plain"], 128)]


# --- what it is good for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("recipe", "factor"),
    [
        ("w4a6_e2m1", 1.5),
        ("w4a6_nf4", 1.7),
        ("int_w4a6", 2.2),
        ("int4", 2.2),
        ("w4a6_static", 1.5),
        ("w4a6_codebook", 1.7),
        ("nvfp4", 1),
    ],
)
@torch.no_grad()
def test_outliers_of_weights_and_inputs_lose_their_effect(recipe: str, factor: float, seed: int) -> None:
    """Columns of weights of ten times the others' size, and channels of inputs; judged on other inputs than fitted to.
    Blocks of 16 have scales of their own: there, rotation is not chosen."""
    generator = torch.Generator().manual_seed(seed)
    model = Layer().eval()
    for linear in (model.one, model.two):
        linear.weight.copy_(torch.randn(32, 128, generator=generator) / 10)
        linear.weight[:, [40, 77]] *= 10
    sample, held_out = ({"x": torch.randn(2, 48, 128, generator=generator)} for _ in range(2))
    for values in (sample, held_out):
        values["x"][..., [3, 11, 14]] *= 10
    config = (
        replace(E2M1, weight="int4", activation="int4") if recipe == "int4" else replace(RECIPES[recipe](), skip=())
    )
    expected = model(**held_out)
    errors = []
    for transforms in ([], ["hadamard"]):
        graph = transform(capture(model, sample), [sample], transforms, config, progress=False)
        errors.append(relative(quantized(graph, config, sample)(**held_out), expected))
    assert errors[1] <= errors[0] / factor * 1.02


@torch.no_grad()
def test_after_smoothing_and_in_half_precision() -> None:
    model, sample = layer_and_sample()
    expected = model(**sample)
    graph = transform(
        capture(model, sample), [sample], [SmoothQuant(points=2), Hadamard(everywhere=True)], E2M1, progress=False
    )
    assert show(graph).index("mul.Tensor") < show(graph).index("unflatten")
    assert relative(graph(**sample), expected) < 2e-6
    half, inputs = copy.deepcopy(model).bfloat16(), {"x": sample["x"].bfloat16()}
    graph = transform(capture(half, inputs), [inputs], [Hadamard(everywhere=True)], E2M1, progress=False)
    assert graph.get_buffer("one.rotation").dtype == torch.bfloat16
    assert relative(graph(**inputs).float(), expected) < 4 * 2**-8


def test_rounding_is_learned_on_a_rotated_graph() -> None:
    model, sample = layer_and_sample()
    graph = transform(capture(model, sample), [sample], [Hadamard(everywhere=True)], E2M1, progress=False)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(E2M1))
    [row] = reconstruct(prepared, [sample] * 2, AdaRoundConfig(iters=30, batch_size=4), progress=False).rows
    assert row.loss_after < row.loss_before


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    model, sample = layer_and_sample()
    graph = capture(model, sample)
    with pytest.raises(ValueError, match="Hadamard needs to know the formats"):
        Hadamard().fit(graph, [sample])
    for wrong in ({"block": 96}, {"block": 8}, {"rows": 0}):
        with pytest.raises(ValueError, match=r"it must be (a power of two from 16 on|at least 1)"):
            Hadamard(**wrong)
    transform(graph, [sample], [Hadamard(everywhere=True)], E2M1, progress=False)
    with pytest.raises(ValueError, match=r"rotated already: it has one\.rotation; apply hadamard once"):
        transform(graph, [sample], ["hadamard"], E2M1, progress=False)
    record = {"groups": [{"linears": ["three"], "block": 128}]}
    with pytest.raises(ValueError, match="no linear three, which was rotated; it is of another model"):
        Hadamard.from_record(record).apply(capture(model, sample))
    with pytest.raises(ValueError, match="Layer has no linear three, which was rotated"):
        Hadamard.from_record(record).apply_to_modules(model)
    with pytest.raises(ValueError, match="is empty"):
        Hadamard.from_record({"groups": [{"linears": [], "block": 128}]})
