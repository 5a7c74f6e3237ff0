"""DiscQuant: its gradient and step by NumPy, ends that are neighbours, any format, errors that fall."""

import numpy as np
import pytest
import torch

from fp4dit_ao import ReconstructionConfig
from fp4dit_ao.passes.reconstruction.rounding import discquant
from fp4dit_ao.passes.reconstruction.rounding.discquant import DiscQuant
from tests.passes.reconstruction.layers import Problem
from tests.passes.reconstruction.rounding.test_sign_gradient import OBSERVERS, random


def rule_for(kind: str, seed: int = 0) -> DiscQuant:
    weight = random(seed)
    return DiscQuant(weight, OBSERVERS[kind]().grid(weight))


@pytest.mark.parametrize("kind", OBSERVERS)
def test_it_starts_at_the_weight_and_ends_at_a_neighbour(kind) -> None:
    rule, weight = rule_for(kind), random()
    grid = OBSERVERS[kind]().grid(weight)
    torch.testing.assert_close(rule(weight), grid.position(weight) * grid.scale)
    around = grid.bracket(weight)
    y = ((around.position - around.low) / around.step).double().numpy()
    np.testing.assert_allclose(rule.drift.numpy(), 2 * y - 1, atol=1e-5)
    assert torch.equal(grid.levels(rule.hard_codes()), grid.levels(grid.encode(weight))), "nearest, where nothing moved"
    rule.alpha.data.copy_(torch.rand(12, 96, generator=torch.Generator().manual_seed(1)))
    x, low, up, scale = (z.detach().double().numpy() for z in (rule.alpha, around.low, around.up, grid.scale))
    np.testing.assert_allclose(rule(weight).detach().numpy(), scale * ((1 - x) * low + x * up), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(grid.levels(rule.hard_codes()).numpy(), np.where(x >= 0.5, up, low))


def test_steps_are_adams_on_the_clipped_gradient_less_the_drift() -> None:
    rules = [rule_for("e2m1"), rule_for("int4 per channel", 3)]
    optimizer = DiscQuant.optimizer(rules, ReconstructionConfig("discquant"))
    count = 2 * 12 * 96
    state = [np.zeros((2, 12, 96)) for _ in rules]
    x = [rule.alpha.detach().double().numpy().copy() for rule in rules]
    for step in range(1, 4):
        for index, rule in enumerate(rules):
            gradient = random(10 * step + index) / count  # about half of them are clipped
            rule.alpha.grad = gradient.clone()
            g = np.clip(discquant.RHO * count * gradient.double().numpy(), -discquant.CLIP, discquant.CLIP)
            g = g - rule.drift.double().numpy()
            first, second = state[index]
            first[:] = 0.9 * first + 0.1 * g
            second[:] = 0.999 * second + 0.001 * g * g
            move = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            x[index] = np.clip(x[index] - discquant.LEARNING_RATE * move, 0, 1)
        optimizer.step()
        for rule, expected in zip(rules, x, strict=True):
            np.testing.assert_allclose(rule.alpha.detach().numpy(), expected, atol=1e-5)


def test_without_objection_every_weight_goes_to_its_nearer_neighbour() -> None:
    rule = rule_for("nvfp4")
    optimizer = DiscQuant.optimizer([rule], ReconstructionConfig("discquant"))
    for _ in range(60):
        rule.alpha.grad = torch.zeros_like(rule.alpha)
        optimizer.step()
    undecided = rule.drift.abs() < 1e-3
    assert torch.equal(rule.alpha[~undecided].detach(), (rule.drift[~undecided] > 0).float())
    assert rule.regularizer(20.0) == 0


def test_learning_rates() -> None:
    rules = [rule_for("e2m1")]
    rates = [
        DiscQuant.optimizer(rules, ReconstructionConfig("discquant", **given)).param_groups[0]["lr"]
        for given in ({}, {"lr": 0.01}, {"relative_lr": 0.4})
    ]
    assert rates == [discquant.LEARNING_RATE, 0.01, pytest.approx(0.1)]
    paces = [DiscQuant.pace(i / 1024) for i in range(1024)]
    assert max(paces) == pytest.approx(1, abs=0.2)
    assert paces[0] < 0.2
    assert paces[-1] < 1e-4
    assert int(np.argmax(paces)) in range(100, 140), "128 steps of warm-up in 1024"


@pytest.mark.parametrize("kind", OBSERVERS)
def test_codes_of_an_earlier_unit_are_kept_and_drifted_to(kind) -> None:
    first = rule_for(kind)
    first.alpha.data.copy_(torch.rand(12, 96, generator=torch.Generator().manual_seed(1)))
    second = rule_for(kind)
    second.start_from(first.hard_codes())
    grid = OBSERVERS[kind]().grid(random())
    assert torch.equal(grid.levels(second.hard_codes()), grid.levels(first.hard_codes()))
    up = (second.hard_codes() == second.up) & (second.up != second.low)
    assert (second.drift[up] > 0).all()
    inside = (second.alpha > 0) & (second.alpha < 1)
    assert inside.float().mean() > 0.5, "free to change"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("recipe", "factor"),
    [("w4a6_e2m1", 0.8), ("int_w4a6", 0.8), ("w4a6_codebook", 0.8), ("nvfp4", 0.95)],
)
def test_held_out_error_is_less_than_that_of_nearest(recipe, factor, seed) -> None:
    problem = Problem(recipe, seed)
    rounded, report = problem.reconstruct("discquant", iters=100)
    assert report.rows[0].kept == "learned"
    assert problem.error(rounded) < factor * problem.error(problem.prepared)
