"""FlexRound and LRQ: the equation by NumPy, gradients in logarithms, any format, codes that can be started from, errors."""

import numpy as np
import pytest
import torch

from fp4dit_ao.passes.reconstruction.rounding.flexround import LRQ, FlexRound
from tests.passes.reconstruction.layers import Problem
from tests.passes.reconstruction.rounding.test_sign_gradient import OBSERVERS, random

RULES = [FlexRound, LRQ]


def rule_for(kind: str, rule: type[FlexRound], spread: float = 0.2) -> FlexRound:
    """A rule with random divisors."""
    weight = random()
    found = rule(weight, OBSERVERS[kind]().grid(weight))
    generator = torch.Generator().manual_seed(1)
    for parameter in found.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * spread
    return found


@pytest.mark.parametrize("rule", RULES)
def test_on_integers_it_is_the_published_equation(rule) -> None:
    """``s1 clip(round(W / (s1 S2 s3)))`` with a scale for each row."""
    found = rule_for("int4 per channel", rule)
    values = {name: p.detach().double().numpy() for name, p in found.named_parameters()}
    w = random().double().numpy()
    s1 = np.abs(w).max(1, keepdims=True) / 7 * np.exp(values["log_scale"])
    divisor = np.exp(values["row"])
    divisor = divisor * (
        np.exp(values["element"]) if rule is FlexRound else np.exp(values["left"] @ values["right"] + values["column"])
    )
    expected = s1 * np.clip(np.round(w / (s1 * divisor)), -7, 7)
    np.testing.assert_allclose(found(random()).detach().numpy(), expected, rtol=1e-5)
    codes = found.grid.rescaled(found.scale_factor()).decode(found.hard_codes())
    np.testing.assert_allclose(codes.detach().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", OBSERVERS)
def test_it_starts_at_nearest_and_gives_values_of_the_grid(kind, rule) -> None:
    weight = random()
    grid = OBSERVERS[kind]().grid(weight)
    start = rule(weight, grid)
    assert torch.equal(grid.levels(start.hard_codes()), grid.levels(grid.encode(weight)))
    torch.testing.assert_close(start(weight), grid.decode(grid.encode(weight)))
    found = rule_for(kind, rule)
    factor = found.scale_factor()
    changed = found.grid if factor is None else found.grid.rescaled(factor)
    torch.testing.assert_close(found(weight), changed.decode(found.hard_codes()))
    assert found.regularizer(20.0) == 0
    moved = (changed.levels(found.hard_codes()) != grid.levels(grid.encode(weight))).float().mean()
    assert moved > 0.1


@pytest.mark.parametrize("kind", ["e2m1", "int4 per channel", "codebook groups", "nvfp4"])
def test_gradients_of_logarithms(kind) -> None:
    """``-W / (S2 s3)`` where it is not clipped, 0 where it is; for a scale's, ``s (level - w / s)``, or all that is clipped."""
    found, weight, outer = rule_for(kind, FlexRound), random(), random(2)
    (found(weight) * outer).sum().backward()
    factor = found.scale_factor()
    grid = found.grid if factor is None else found.grid.rescaled(factor.detach())
    divided = weight * torch.exp(-found.log_divisor().detach())
    inside = grid.position(divided) == divided / grid.scale
    assert not inside.all()
    expected = torch.where(inside, -divided * outer, 0)
    torch.testing.assert_close(found.element.grad, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.row.grad, expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-4)
    if found.log_scale is not None:
        value = grid.decode(found.hard_codes())
        each = outer * torch.where(inside, value - divided, value)
        blocks = each.reshape(12, -1, 96 // found.log_scale.shape[1]).sum(-1)
        torch.testing.assert_close(found.log_scale.grad, blocks, rtol=1e-4, atol=1e-4)


def test_one_learning_rate_serves_all_binades_and_magnitudes() -> None:
    weight = random()
    rates = [
        FlexRound(weight * size, OBSERVERS["e2m1"]().grid(weight * size)).learning_rate(5e-3) for size in (1.0, 1e-3)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=1e-3)
    assert 1e-4 < rates[0] < 1e-3, "the paper's is between 5e-4 and 3e-3"
    assert [FlexRound.pace(p) for p in (0, 0.5)] == [1, pytest.approx(0.5)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", OBSERVERS)
def test_codes_of_an_earlier_unit_are_kept_and_can_change(kind, rule) -> None:
    first = rule_for(kind, FlexRound, spread=0.4)
    factor = first.scale_factor()
    grid = first.grid if factor is None else first.grid.rescaled(factor.detach())
    settled = first.hard_codes()
    second = rule(random(), grid)
    second.start_from(settled)
    assert torch.equal(grid.levels(second.hard_codes()), grid.levels(settled))
    assert torch.isfinite(second.log_divisor()).all()
    moved = grid.levels(settled) != grid.levels(grid.encode(random()))
    with torch.no_grad():
        second.row += 0.35
        fewer = second.hard_codes()
        second.row -= 0.7
        more = second.hard_codes()
    assert ((fewer != settled) | (more != settled))[moved].float().mean() > 0.5


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("rounding", "recipe", "factor"),
    [
        ("flexround", "w4a6_e2m1", 0.7), ("flexround", "int_w4a6", 0.9), ("flexround", "w4a6_codebook", 0.9),
        ("flexround", "nvfp4", 0.95), ("lrq", "w4a6_e2m1", 0.9), ("lrq", "int_w4a6", 0.95), ("lrq", "w4a6_codebook", 1),
    ],
)  # fmt: skip
def test_held_out_error_is_less_than_that_of_nearest(recipe, factor, rounding, seed) -> None:
    problem = Problem(recipe, seed)
    rounded, report = problem.reconstruct(rounding, iters=100)
    assert report.rows[0].kept == "learned"
    assert problem.error(rounded) < factor * problem.error(problem.prepared)
