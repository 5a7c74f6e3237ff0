"""GPTQ: the published equations, computed in another way; never worse than nearest where it matters; any format and scale."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

from fp4dit_ao.formats import parse
from fp4dit_ao.observers import BlockWeightObserver, Grid, WeightObserver
from fp4dit_ao.passes.reconstruction.rounding import GPTQ, ROUNDINGS

OBSERVERS = {
    "e2m1": lambda: WeightObserver("e2m1", PerGroup(16)),
    "e3m0": lambda: WeightObserver("e3m0", PerGroup(16)),
    "nf4": lambda: WeightObserver("nf4", PerGroup(16), search="mse"),
    "int4 per channel": lambda: WeightObserver("int4", PerAxis(0)),
    "e2m1 per tensor": lambda: WeightObserver("e2m1", PerTensor()),
    "e2m3, float16 scales": lambda: WeightObserver("e2m3", PerGroup(32), scale_dtype=torch.float16),
    "nvfp4": lambda: BlockWeightObserver("e2m1", "e4m3"),
    "mxfp4": lambda: BlockWeightObserver("e2m1", "e8m0"),
}
"""Every kind of format, scale and granularity."""


def problem(rows: int = 12, columns: int = 96, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    x = (torch.randn(tokens, columns, generator=generator) @ mixing * sizes).double()
    return weight, 2 * x.T @ x


def layer_error(weight: Tensor, grid: Grid, codes: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T)``."""
    error = grid.decode(codes).double() - weight.double()
    return float(((error @ hessian) * error).sum())


def naive(weight: Tensor, grid: Grid, hessian: Tensor, damping: float, order: list[int]) -> Tensor:
    """Optimal Brain Quantization in a given order: an explicit inverse, shrunk by Gaussian elimination, in float64."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    inverse = torch.linalg.inv(hessian)
    work, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    left = list(order)
    for j in order:
        levels = grid.fmt.lattice.double() * grid.scale[:, j : j + 1].double()
        nearest = (work[:, j : j + 1] - levels).abs().argmin(1)
        rounded = levels.gather(1, nearest[:, None])[:, 0]
        codes[:, j] = grid.fmt.encode(grid.fmt.lattice.float()[nearest])
        step = (work[:, j] - rounded) / inverse[j, j]
        for k in left:
            if k != j:
                work[:, k] -= step * inverse[j, k]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.remove(j)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_it_solves_the_published_equations(kind, act_order) -> None:
    """Blocks of 20 columns, which divide neither the 96 columns nor the groups."""
    weight, hessian = problem()
    grid = OBSERVERS[kind]().grid(weight)
    codes = GPTQ(act_order, block_size=20).solve(weight, grid, hessian.clone(), "fc.weight")
    order = sorted(range(96), key=lambda j: -float(hessian[j, j])) if act_order else list(range(96))
    expected = naive(weight, grid, hessian, 0.01, order)
    assert torch.equal(grid.levels(codes), grid.levels(expected))


@pytest.mark.parametrize("method", ["gptq", "gptq_act_order"])
@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("seed", range(3))
def test_its_error_is_less_than_that_of_nearest(kind, method, seed) -> None:
    weight, hessian = problem(seed=seed)
    grid = OBSERVERS[kind]().grid(weight)
    codes = ROUNDINGS[method].solve(weight, grid, hessian.clone(), "fc.weight")
    nearest = layer_error(weight, grid, grid.encode(weight), hessian)
    assert layer_error(weight, grid, codes, hessian) < 0.8 * nearest
    assert torch.equal(grid.fmt.encode(grid.fmt.decode(codes)), grid.fmt.encode(grid.levels(codes)))


@pytest.mark.parametrize("method", ["gptq", "gptq_act_order"])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_uncorrelated_inputs_leave_nearest(kind, method) -> None:
    """With a diagonal Hessian no column can make good what another lost."""
    weight, _ = problem()
    observer = OBSERVERS[kind]()
    for diagonal in (torch.ones(96), torch.linspace(0.1, 9, 96)):
        hessian = torch.diag(diagonal.double())
        codes = ROUNDINGS[method].solve(weight, observer.grid(weight), hessian, "fc.weight")
        assert torch.equal(codes, observer.quantized(weight)[0])


def test_it_lies_between_the_optimum_and_nearest() -> None:
    """Of all ``15^4`` roundings of four weights, GPTQ gains nine tenths of what the best one gains over nearest."""
    losses = []
    for seed in range(20):
        weight, hessian = problem(rows=1, columns=4, tokens=50, seed=seed)
        grid = WeightObserver("int4", PerTensor()).grid(weight)
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(4, dtype=torch.float64)
        values = torch.tensor(list(itertools.product(grid.fmt.lattice.tolist(), repeat=4))).double()
        errors = values * grid.scale[0, 0].double() - weight.double()
        best = float(((errors @ damped) * errors).sum(1).min())
        solved = layer_error(weight, grid, GPTQ().solve(weight, grid, hessian, "fc.weight"), damped)
        nearest = layer_error(weight, grid, grid.encode(weight), damped)
        assert best <= solved * (1 + 1e-5)  # decoded values are float32
        losses.append((best, solved, nearest))
    best, solved, nearest = torch.tensor(losses).sum(0).tolist()
    assert nearest - solved > 0.9 * (nearest - best)


def test_each_column_is_optimal_given_the_ones_before() -> None:
    """The last column, on which nothing depends: no other level of its grid has less error (damped Hessian)."""
    weight, hessian = problem(rows=4, columns=32)
    grid = WeightObserver("e2m1", PerGroup(16)).grid(weight)
    codes = GPTQ().solve(weight, grid, hessian.clone(), "fc.weight")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    for row in range(4):
        own = codes[row : row + 1]
        part = grid.scale[row : row + 1]
        one = Grid(grid.fmt, part)
        least = layer_error(weight[row : row + 1], one, own, damped)
        for code in range(16):
            other = own.clone()
            other[0, -1] = code
            assert layer_error(weight[row : row + 1], one, other, damped) >= least * (1 - 1e-6)


@pytest.mark.parametrize("columns", [32, 96, 128, 160, 384])
def test_the_block_size_changes_nothing_but_the_last_bits(columns) -> None:
    weight, hessian = problem(columns=columns, tokens=2 * columns)
    grid = WeightObserver("e2m1", PerGroup(32)).grid(weight)
    expected = GPTQ(block_size=columns).solve(weight, grid, hessian.clone(), "fc.weight")
    for size in (1, 7, 128):
        codes = GPTQ(block_size=size).solve(weight, grid, hessian.clone(), "fc.weight")
        assert (codes != expected).float().mean() < 0.002


def test_columns_without_input_are_rounded_to_nearest() -> None:
    weight, hessian = problem()
    dead = [0, 17, 95]
    hessian[dead] = 0
    hessian[:, dead] = 0
    grid = WeightObserver("e2m1", PerGroup(16)).grid(weight)
    for method in (GPTQ(), GPTQ(act_order=True), GPTQ(damping=1e-6)):
        codes = method.solve(weight, grid, hessian.clone(), "fc.weight")
        assert torch.equal(codes[:, dead], grid.encode(weight)[:, dead])
    assert torch.equal(GPTQ().solve(weight, grid, torch.zeros_like(hessian), "fc.weight"), grid.encode(weight))


def test_fewer_tokens_than_inputs_need_damping_and_no_more() -> None:
    weight, hessian = problem(tokens=10)
    grid = WeightObserver("e2m1", PerGroup(16)).grid(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = GPTQ().solve(weight, grid, hessian.clone(), "fc.weight")
    assert layer_error(weight, grid, codes, hessian) < layer_error(weight, grid, grid.encode(weight), hessian)
    with pytest.warns(
        UserWarning, match=r"fc.weight: the Hessian of 96 inputs is not positive definite .* trying 0.01"
    ):
        GPTQ(damping=0.0).solve(weight, grid, hessian - 1e-3 * torch.eye(96), "fc.weight")


def test_a_hessian_that_is_none_is_refused() -> None:
    weight, hessian = problem()
    grid = WeightObserver("e2m1", PerGroup(16)).grid(weight)
    with pytest.raises(ValueError, match=r"fc.weight: a Hessian of shape \(4, 4\) for a weight of shape \(12, 96\)"):
        GPTQ().solve(weight, grid, hessian[:4, :4], "fc.weight")
    with pytest.raises(ValueError, match=r"fc.weight: the Hessian of 96 inputs holds NaN or Inf"):
        GPTQ().solve(weight, grid, hessian.fill_diagonal_(torch.inf), "fc.weight")
    indefinite = torch.ones(96, 96, dtype=torch.float64) * 100 - 99 * torch.eye(96)
    indefinite[0, 1:] = indefinite[1:, 0] = 1e5
    with warnings.catch_warnings(), pytest.raises(ValueError, match="not positive definite with any damping up to 10"):
        warnings.simplefilter("ignore")
        GPTQ().solve(weight, grid, indefinite, "fc.weight")


def test_the_weight_and_its_scales_are_left_alone() -> None:
    weight, hessian = problem()
    before = weight.clone()
    observer = WeightObserver("e2m1", PerGroup(16))
    grid = observer.grid(weight)
    scale = observer.scale.clone()
    GPTQ(act_order=True).solve(weight, grid, hessian, "fc.weight")
    assert torch.equal(weight, before)
    assert torch.equal(observer.scale, scale)


def test_half_precision_weights_are_solved_in_float32() -> None:
    weight, hessian = problem()
    half = weight.to(torch.bfloat16)
    grid = WeightObserver("e2m1", PerGroup(16)).grid(half)
    assert torch.equal(
        GPTQ().solve(half, grid, hessian.clone(), "fc.weight"), GPTQ().solve(half.float(), grid, hessian, "fc.weight")
    )


def test_every_format_that_has_a_name_works() -> None:
    for name in ("e1m2", "e2m0", "e3m2", "e4m3fn", "int8"):
        weight, hessian = problem()
        grid = WeightObserver(parse(name), PerGroup(16)).grid(weight)
        codes = GPTQ().solve(weight, grid, hessian.clone(), "fc.weight")
        assert layer_error(weight, grid, codes, hessian) < layer_error(weight, grid, grid.encode(weight), hessian)
