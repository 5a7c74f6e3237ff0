"""Weights trained through their rounding: values, gradients and steps against plain sums over the formats' levels."""

import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerGroup

from fp4dit_ao.formats import codebook_set, parse
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.block_scaled import BlockWeightObserver
from fp4dit_ao.observers.codebook import CodebookWeightObserver
from fp4dit_ao.passes.fine_tuning.efficientdm import LowRankAdapter
from fp4dit_ao.passes.fine_tuning.latent_weight import FullWeight


def observers() -> dict[str, WeightObserver]:
    return {
        "e2m1": WeightObserver("e2m1", PerGroup(32), search="mse"),
        "int4": WeightObserver("e1m2", PerGroup(32), search="mse"),
        "nvfp4": BlockWeightObserver("e2m1", "e4m3"),
        "mxfp4": BlockWeightObserver("e2m1", "e8m0"),
    }


def weight(seed: int = 0, rows: int = 6, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def nearest(value: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """Nearest level times scale, by distance to every level."""
    values = parse(fmt).lattice.float() * scale[..., None]
    return values.gather(-1, (value[..., None] - values).abs().argmin(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("name", observers())
def test_it_starts_where_the_observer_is_and_settles_on_what_it_computed(name: str) -> None:
    observer, w = observers()[name], weight()
    student = FullWeight(w, observer)
    torch.testing.assert_close(student(w), observer.dequantized(w), rtol=1e-6, atol=0)
    with torch.no_grad():
        student.value += weight(1) * 0.3
    scale = observer.grid(w).scale
    wanted = nearest(student.value, scale, str(observer.fmt))
    torch.testing.assert_close(student(w), wanted, rtol=1e-6, atol=1e-8)
    observer.settle(student.settled())
    torch.testing.assert_close(observer.dequantized(w), wanted, rtol=1e-6, atol=1e-8)


def test_codebook_groups_are_trained_too() -> None:
    w = weight(columns=128)
    observer = CodebookWeightObserver(codebook_set("nf4_groups"), group_size=64)
    student = LowRankAdapter(w, observer, rank=4)
    torch.testing.assert_close(student(w), observer.dequantized(w))
    with torch.no_grad():
        student.up.normal_(std=0.05)
    merged = (w + student.up @ student.down).detach()
    assert observer.index is not None
    books = observer.fmt.tensor(w.device).float()[observer.index.long()].repeat_interleave(64, 1)
    assert observer.scale is not None
    values = books * observer.scale[:, None, None]
    wanted = values.gather(-1, (merged[..., None] - values).abs().argmin(-1, keepdim=True)).squeeze(-1)
    observer.settle(student.settled())
    torch.testing.assert_close(observer.dequantized(w), wanted)


def test_it_starts_at_an_earlier_rounding() -> None:
    observer, w = observers()["e2m1"], weight()
    codes, _ = observer.quantized(w)
    other = torch.where(torch.arange(64) % 3 == 0, observer.grid(w).bracket(w).up_codes, codes)
    observer.codes = other
    student = FullWeight(w, observer)
    torch.testing.assert_close(student(w), observer.dequantized(w))
    fmt = parse("e2m1")
    assert torch.equal(fmt.decode(student.settled().codes), fmt.decode(other))
    assert torch.equal(student.value[:, 1], w[:, 1])  # a weight whose code is the nearest is left as it is


@pytest.mark.parametrize("name", ["e2m1", "nvfp4"])
def test_gradients_pass_within_the_levels_and_end_beyond_them(name: str) -> None:
    """dL/dV is dL/dW^, or 0; dL/ds is (Q(V)/s - V/s) dL/dW^, or the outermost level's, summed over the group."""
    observer, w = observers()[name], weight()
    student = FullWeight(w, observer)
    with torch.no_grad():
        student.value[:, ::7] *= 3  # some beyond the largest level
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    (student(w) * upstream).sum().backward()
    scale, most = observer.grid(w).scale, parse("e2m1").lattice_max
    position = student.value.detach() / scale
    inside = position.abs() <= most
    assert 0.02 < float((~inside).float().mean()) < 0.5
    assert isinstance(student.value, torch.nn.Parameter) and student.value.grad is not None
    torch.testing.assert_close(student.value.grad, upstream * inside)
    if name == "nvfp4":
        assert student.log_scale is None  # an E4M3 number is no free one
        return
    level = nearest(student.value.detach(), scale, "e2m1") / scale
    by_hand = upstream * scale * (level - torch.where(inside, position, 0.0))  # d/d log s is s d/ds
    assert student.log_scale is not None and student.log_scale.grad is not None
    torch.testing.assert_close(student.log_scale.grad, by_hand.unflatten(1, (2, 32)).sum(-1), rtol=1e-4, atol=1e-6)


def test_a_step_is_the_mean_distance_of_levels_around_the_weights() -> None:
    observer, w = observers()["e2m1"], weight()
    student = FullWeight(w, observer)
    levels, scale = parse("e2m1").lattice.tolist(), observer.grid(w).scale
    total = 0.0
    for value, unit in zip(w.flatten().tolist(), scale.flatten().tolist(), strict=True):
        position = max(levels[0], min(levels[-1], value / unit))
        below = max(x for x in levels if x <= position)
        above = [x for x in levels if x > below]
        total += unit * (above[0] - below if above else below - levels[-2])
    assert student.step == pytest.approx(total / w.numel(), rel=1e-5)
    assert [group["lr"] for group in student.groups(0.5)] == [pytest.approx(0.5 * student.step), 0.5 / 8]


def test_an_adapter_is_merged_before_it_is_rounded() -> None:
    """W^ = Q(W + B A), and gradients of A and B are those of the product; LoRA's start changes nothing."""
    observer, w = observers()["int4"], weight()
    student = LowRankAdapter(w, observer, rank=3, seed=5)
    torch.testing.assert_close(student(w), observer.dequantized(w), rtol=1e-6, atol=0)
    assert float(student.down.detach().abs().max()) <= 64**-0.5
    assert not torch.equal(student.down, LowRankAdapter(w, observer, rank=3, seed=6).down)
    with torch.no_grad():
        student.up.copy_(weight(3, 6, 3))
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(2))
    (student(w) * upstream).sum().backward()
    scale = observer.grid(w).scale
    merged = w + student.up.detach() @ student.down.detach()
    passed = upstream * ((merged / scale).abs() <= parse("e1m2").lattice_max)
    assert student.up.grad is not None and student.down.grad is not None
    torch.testing.assert_close(student.up.grad, passed @ student.down.detach().T)
    torch.testing.assert_close(student.down.grad, student.up.detach().T @ passed)
    torch.testing.assert_close(student(w), nearest(merged, scale, "e1m2"), rtol=1e-6, atol=1e-8)
    assert student.groups(2.0)[0]["lr"] == pytest.approx(2 * student.step)
