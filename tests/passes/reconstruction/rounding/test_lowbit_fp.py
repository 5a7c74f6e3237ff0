"""LowBit-FP's rounding: its gate, regularizer and threshold by NumPy, gradients, errors that fall."""

import numpy as np
import pytest
import torch

from fp4dit_ao.passes.reconstruction.rounding.lowbit_fp import EDGE, LowBitFP
from tests.passes.reconstruction.layers import Problem
from tests.passes.reconstruction.rounding.test_sign_gradient import OBSERVERS, random


def rule_for(kind: str) -> LowBitFP:
    weight = random()
    return LowBitFP(weight, OBSERVERS[kind]().grid(weight))


@pytest.mark.parametrize("kind", OBSERVERS)
def test_gate_regularizer_and_threshold(kind) -> None:
    weight, grid = random(), OBSERVERS[kind]().grid(random())
    rule = LowBitFP(weight, grid)
    around = grid.bracket(weight)
    fraction = ((around.position - around.low) / around.step).double().numpy().clip(EDGE, 1 - EDGE)
    v = np.log(fraction / (1 - fraction))
    np.testing.assert_allclose(rule.alpha.detach().numpy(), v, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        rule.alpha += torch.randn(12, 96, generator=torch.Generator().manual_seed(1))
    h = 1 / (1 + np.exp(-rule.alpha.detach().double().numpy()))
    low, up, scale = (x.double().numpy() for x in (around.low, around.up, grid.scale))
    np.testing.assert_allclose(rule(weight).detach().numpy(), scale * (low + (up - low) * h), rtol=1e-5, atol=1e-6)
    expected = (1 - np.abs(2 * h - 1) ** 20).mean()
    for beta in (2.0, 20.0):
        assert float(rule.regularizer(beta)) == pytest.approx(expected, rel=1e-5)
    hard = np.where(h >= 0.5, up, low)
    np.testing.assert_array_equal(grid.levels(rule.hard_codes()).double().numpy(), hard)


def test_it_starts_at_the_weight_and_hardens_to_nearest() -> None:
    for kind in OBSERVERS:
        rule, weight = rule_for(kind), random()
        around = rule_for(kind).span
        clipped = OBSERVERS[kind]().grid(weight)
        target = clipped.position(weight) * clipped.scale
        assert ((rule(weight) - target).abs() <= around * EDGE * 1.01 + 1e-6).all()
        assert torch.equal(clipped.levels(rule.hard_codes()), clipped.levels(clipped.encode(weight)))


def test_gradients_are_those_of_the_equations() -> None:
    rule, weight, outer = rule_for("e2m1"), random(), random(2)
    h = rule.gate().detach()
    (gradient,) = torch.autograd.grad((rule(weight) * outer).sum(), rule.alpha, retain_graph=True)
    torch.testing.assert_close(gradient, outer * rule.span * h * (1 - h))
    (gradient,) = torch.autograd.grad(rule.regularizer(3.0), rule.alpha)
    signed = 2 * h - 1
    expected = -20 * signed.abs() ** 19 * signed.sign() * 2 * h * (1 - h) / h.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_codes_of_an_earlier_unit_are_kept(kind) -> None:
    rule = rule_for(kind)
    settled = torch.where(torch.rand(12, 96, generator=torch.Generator().manual_seed(1)) < 0.5, rule.low, rule.up)
    rule.start_from(settled)
    assert torch.equal(rule.hard_codes(), settled)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("recipe", ["w4a6_e2m1", "int_w4a6", "w4a6_codebook"])
def test_held_out_error_is_less_than_that_of_nearest(recipe, seed) -> None:
    problem = Problem(recipe, seed, activation=None, attention=None)
    rounded, report = problem.reconstruct("lowbit_fp", relative_lr=0.1, regularizer=10.0, batch_size=16)
    assert report.rows[0].kept == "learned"
    assert problem.error(rounded) < 0.9 * problem.error(problem.prepared)
