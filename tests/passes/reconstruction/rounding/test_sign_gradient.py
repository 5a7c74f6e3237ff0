"""AutoRound's rounding: its equation on integers, neighbours in every format, gradients, signed steps, errors that fall."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import BlockWeightObserver, CodebookWeightObserver, Grid, WeightObserver
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction.rounding.sign_gradient import SignGradient, SignSGD
from tests.passes.reconstruction.layers import Problem

OBSERVERS = {
    "e2m1": lambda: WeightObserver("e2m1", PerGroup(16)),
    "e3m0": lambda: WeightObserver("e3m0", PerGroup(16)),
    "nf4, searched": lambda: WeightObserver("nf4", PerGroup(16), search="mse"),
    "int4 per channel": lambda: WeightObserver("int4", PerAxis(0)),
    "e2m3 per tensor, float16 scales": lambda: WeightObserver("e2m3", PerTensor(), scale_dtype=torch.float16),
    "codebook groups": lambda: CodebookWeightObserver("e2m1_groups", 16),
    "nvfp4": lambda: BlockWeightObserver("e2m1", "e4m3"),
    "mxfp4": lambda: BlockWeightObserver("e2m1", "e8m0"),
}


def random(seed: int = 0) -> Tensor:
    return torch.randn(12, 96, generator=torch.Generator().manual_seed(seed))


def rule_for(kind: str, offsets: bool = True) -> tuple[SignGradient, Tensor, Grid]:
    weight = random()
    grid = OBSERVERS[kind]().grid(weight)
    rule = SignGradient(weight, grid)
    if offsets:
        rule.offset.data.copy_(torch.rand(12, 96, generator=torch.Generator().manual_seed(1)) - 0.5)
    return rule, weight, grid


@pytest.mark.parametrize("factor", [1.0, 0.8, 1.1])
def test_on_integers_it_is_the_published_equation(factor) -> None:
    """``s clip(round(W / s + V), -7, 7)``, ``s = factor max|W| / 7``."""
    rule, weight, _ = rule_for("int4 per channel")
    rule.stretch.data.fill_(factor - 1)
    w, v = weight.double().numpy(), rule.offset.detach().double().numpy()
    s = np.abs(w).max(1, keepdims=True) / 7 * factor
    expected = s * np.clip(np.floor(w / s + v + 0.5), -7, 7)
    np.testing.assert_allclose(rule(weight).detach().numpy(), expected, rtol=1e-6)
    found = rule.grid.rescaled(rule.scale_factor()).decode(rule.hard_codes())
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_it_starts_at_nearest_and_reaches_both_neighbours_and_no_further(kind) -> None:
    rule, weight, grid = rule_for(kind, offsets=False)
    around = grid.bracket(weight)
    assert torch.equal(grid.levels(rule.hard_codes()), grid.levels(grid.encode(weight)))
    torch.testing.assert_close(rule(weight), grid.decode(grid.encode(weight)))
    for bound, level in ((0.5, around.up), (-0.5, around.low)):
        rule.offset.data.fill_(bound)
        inside = around.low != around.position  # exactly on a level it takes both halves of the way
        assert torch.equal(grid.levels(rule.hard_codes())[inside], level[inside])
    rule, weight, grid = rule_for(kind)
    hard = grid.levels(rule.hard_codes())
    assert ((hard == around.low) | (hard == around.up)).all()
    torch.testing.assert_close(rule(weight), hard * grid.scale)
    assert rule.regularizer(20.0) == 0


@pytest.mark.parametrize("kind", ["e2m1", "int4 per channel", "codebook groups", "nvfp4"])
def test_gradients_pass_rounding(kind) -> None:
    """Into V as the neighbours' distance; into a scale as ``level - w / s``, and as the level where that is clipped."""
    rule, weight, grid = rule_for(kind)
    if rule.stretch is not None:
        rule.stretch.data.fill_(-0.1)
        grid = grid.rescaled(torch.full_like(grid.stored, 0.9))
    outer = random(2)
    (rule(weight) * outer).sum().backward()
    around, level = grid.bracket(weight), grid.levels(rule.hard_codes())
    torch.testing.assert_close(rule.offset.grad, outer * (around.up - around.low) * grid.scale)
    if rule.stretch is not None:
        ratio = weight / grid.scale
        inside = around.position == ratio
        assert not inside.all()
        soft = outer * grid.scale / 0.9 * torch.where(inside, level - ratio, level)
        blocks = soft.reshape(12, -1, 96 // rule.stretch.shape[1]).sum(-1)
        torch.testing.assert_close(rule.stretch.grad, blocks, rtol=1e-4, atol=1e-4)


def test_scales_are_learned_where_they_are_free_numbers() -> None:
    shapes = {kind: SignGradient(random(), make().grid(random())).stretch for kind, make in OBSERVERS.items()}
    assert {kind: None if x is None else tuple(x.shape) for kind, x in shapes.items()} == {
        "e2m1": (12, 6), "e3m0": (12, 6), "nf4, searched": (12, 6), "int4 per channel": (12, 1),
        "e2m3 per tensor, float16 scales": (1, 1), "codebook groups": None, "nvfp4": None, "mxfp4": None,
    }  # fmt: skip


def test_steps_are_signs_that_add_up_to_one_half() -> None:
    config = ReconstructionConfig("sign_gradient", iters=50)
    rule, _, _ = rule_for("e2m1", offsets=False)
    optimizer = SignGradient.optimizer([rule], config)
    assert isinstance(optimizer, SignSGD)
    signs = torch.sign(random(3))
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 1 / 50 * SignGradient.pace(step / 50)
        rule.offset.grad = signs * (1 + step) * 1e-9  # a gradient's size says nothing
        rule.stretch.grad = torch.zeros_like(rule.stretch)
        optimizer.step()
    torch.testing.assert_close(rule.offset.detach(), -signs * 0.5)  # sum of (1 - k / 50) / 50 is 0.51, clipped
    assert not rule.stretch.any()
    rates = [
        SignGradient.optimizer([rule], ReconstructionConfig("sign_gradient", **how)).param_groups[0]["lr"]
        for how in ({"iters": 200}, {"lr": 1e-3}, {"relative_lr": 0.02})
    ]
    assert rates == [1 / 200, 1e-3, 0.005]


@pytest.mark.parametrize("kind", OBSERVERS)
def test_codes_of_an_earlier_unit_are_kept_and_can_change(kind) -> None:
    first, weight, grid = rule_for(kind)
    settled = first.hard_codes()
    rule = SignGradient(weight, grid)
    rule.start_from(settled)
    assert torch.equal(rule.hard_codes(), settled)
    assert rule.offset.abs().max() <= 0.5
    around = grid.bracket(weight)
    soft = around.position + rule.offset * (around.up - around.low)
    nearest = grid.levels(grid.encode(weight)) == grid.levels(settled)
    middle = (around.low + around.up) / 2
    assert ((soft - middle).abs()[~nearest] <= (around.up - around.low)[~nearest] / 64 * 1.01).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("recipe", "factor"), [("w4a6_e2m1", 0.85), ("int_w4a6", 0.95), ("w4a6_codebook", 0.95), ("nvfp4", 0.97)]
)
def test_held_out_error_is_less_than_that_of_nearest(recipe, factor, seed) -> None:
    problem = Problem(recipe, seed)
    rounded, report = problem.reconstruct("sign_gradient", iters=100)
    assert report.rows[0].kept == "learned"
    assert problem.error(rounded) < factor * problem.error(problem.prepared)


def test_learned_scales_are_stored_and_forgotten() -> None:
    problem = Problem("w4a6_e2m1", scale_dtype="float16")
    rounded, _ = problem.reconstruct("sign_gradient", iters=30, lr=0.01)
    (_, observer), (_, before) = next(weight_observers(rounded)), next(weight_observers(problem.prepared))
    assert observer.scale.dtype == torch.float16
    ratio = observer.scale.float() / before.scale.float()
    assert 0.7 < ratio.min() < ratio.max() < 1.3
    assert (ratio != 1).float().mean() > 0.5
    buffers = dict(convert_pt2e(copy.deepcopy(rounded)).named_buffers())
    assert torch.equal(buffers["fc.weight_scale"], observer.scale)
    observer.forget()
    assert torch.equal(observer.scale, before.scale)
    assert observer.codes is None


def test_the_state_of_the_least_error_is_kept() -> None:
    """Long steps do not settle: the last state is worse than nearest, one on the way is better."""
    problem = Problem("w4a6_e2m1")
    _, report = problem.reconstruct("sign_gradient", lr=0.05, batch_size=16)
    assert report.rows[0].loss_after < 0.97 * report.rows[0].loss_before
