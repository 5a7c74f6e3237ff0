"""CBQ's rounding: gates of a low-rank matrix by NumPy, its start, gradients, fewer parameters, errors that fall."""

import numpy as np
import pytest
import torch

from fp4dit_ao.passes.reconstruction.rounding.adaround import AdaRound
from fp4dit_ao.passes.reconstruction.rounding.cbq import RANK, LowRankAdaRound
from tests.passes.reconstruction.layers import Problem
from tests.passes.reconstruction.rounding.test_sign_gradient import OBSERVERS, random


def rule_for(kind: str, moved: bool = False) -> LowRankAdaRound:
    weight = random()
    rule = LowRankAdaRound(weight, OBSERVERS[kind]().grid(weight))
    if moved:
        rule.right.data.copy_(torch.randn(rule.right.shape, generator=torch.Generator().manual_seed(1)))
    return rule


@pytest.mark.parametrize("kind", OBSERVERS)
def test_gates_are_those_of_the_equation(kind) -> None:
    weight, rule = random(), rule_for(kind, moved=True)
    grid = OBSERVERS[kind]().grid(weight)
    around = grid.bracket(weight)
    fraction = ((around.position - around.low) / around.step).double().numpy()
    v0 = -np.log(1.2 / (fraction + 0.1) - 1)
    v = v0 + rule.left.detach().double().numpy() @ rule.right.detach().double().numpy()
    h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
    low, up, scale = (x.double().numpy() for x in (around.low, around.up, grid.scale))
    np.testing.assert_allclose(rule(weight).detach().numpy(), scale * (low + (up - low) * h), rtol=1e-4, atol=1e-5)
    assert float(rule.regularizer(3.0)) == pytest.approx((1 - np.abs(2 * h - 1) ** 3).mean(), rel=1e-4)
    sure = np.abs(v) > 1e-3
    found = grid.levels(rule.hard_codes()).double().numpy()
    np.testing.assert_array_equal(found[sure], np.where(v >= 0, up, low)[sure])


@pytest.mark.parametrize("kind", OBSERVERS)
def test_it_starts_where_adaround_does_and_learns_a_matrix_of_low_rank(kind) -> None:
    rule, weight = rule_for(kind), random()
    plain = AdaRound(weight, OBSERVERS[kind]().grid(weight))
    assert torch.equal(rule(weight), plain(weight))
    assert torch.equal(rule.hard_codes(), plain.hard_codes())
    assert {name: tuple(p.shape) for name, p in rule.named_parameters()} == {"left": (12, RANK), "right": (RANK, 96)}
    moved = rule_for(kind, moved=True)
    assert torch.linalg.matrix_rank(moved.variable().detach() - moved.alpha) == RANK
    assert torch.equal(rule_for(kind).left, rule_for(kind).left), "the same start every time"


def test_gradients_are_those_of_adaround_times_the_factors() -> None:
    rule, weight, outer = rule_for("e2m1", moved=True), random(), random(2)
    plain = AdaRound(weight, OBSERVERS["e2m1"]().grid(weight))
    plain.alpha.data.copy_(rule.variable().detach())
    (each,) = torch.autograd.grad((plain(weight) * outer).sum() + plain.regularizer(3.0), plain.alpha)
    left, right = torch.autograd.grad((rule(weight) * outer).sum() + rule.regularizer(3.0), [rule.left, rule.right])
    torch.testing.assert_close(left, each @ rule.right.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right, rule.left.T @ each, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_codes_of_an_earlier_unit_are_kept(kind) -> None:
    first, second = rule_for(kind, moved=True), rule_for(kind)
    second.start_from(first.hard_codes())
    grid = OBSERVERS[kind]().grid(random())
    assert torch.equal(grid.levels(second.hard_codes()), grid.levels(first.hard_codes()))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("recipe", ["w4a6_e2m1", "int_w4a6", "w4a6_codebook", "nvfp4"])
def test_held_out_error_is_less_than_that_of_nearest(recipe, seed) -> None:
    problem = Problem(recipe, seed)
    rounded, report = problem.reconstruct("cbq")
    assert report.rows[0].kept == "learned"
    assert problem.error(rounded) < 0.97 * problem.error(problem.prepared)
