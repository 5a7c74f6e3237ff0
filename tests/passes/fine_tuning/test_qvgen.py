"""QVGen's branch: where it starts, how it fades, and that nothing of it is left."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.quantization.granularity import PerGroup

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.fine_tuning.qvgen import FadingBranch


def student(rank: int = 8) -> tuple[FadingBranch, Tensor, Tensor]:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    observer = WeightObserver("e2m1", PerGroup(32))
    return FadingBranch(weight, observer, rank=rank), weight, observer.dequantized(weight)


def test_it_starts_with_the_largest_part_of_the_rounding_error() -> None:
    branch, weight, rounded = student()
    left, values, right = np.linalg.svd((weight - rounded).double().numpy())
    wanted = (left[:, :8] * values[:8]) @ right[:8]
    np.testing.assert_allclose((branch.left @ branch.right).detach().numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(branch(weight).detach().numpy(), rounded.numpy() + wanted, atol=1e-6)


def test_each_phase_fades_the_second_half_of_the_ranks() -> None:
    """32 steps in phases of 8 for the ranks 8, 4, 2, 1, by the paper's cosine."""
    branch, weight, rounded = student()
    seen = []
    for step in range(33):
        branch.advance(step, 33)
        seen.append(branch.weights_of_ranks().tolist())
    for step in range(32):
        phase, within = divmod(step, 8)
        u = (1 + math.cos(math.pi * within / 8)) / 2
        alive = 8 >> phase
        assert seen[step] == pytest.approx([1.0] * (alive // 2) + [u] * (alive - alive // 2) + [0.0] * (8 - alive))
    assert seen[32] == [0.0] * 8
    assert torch.equal(branch(weight), branch.beside(branch.latent(), branch(weight)))  # no branch
    torch.testing.assert_close(branch(weight), rounded, rtol=1e-6, atol=0)


def test_what_is_left_is_decomposed_anew() -> None:
    """At the end of a phase the product of the ranks that stay is the same, and ordered by singular values again."""
    branch, _, _ = student()
    with torch.no_grad():
        branch.left.add_(torch.randn(24, 8, generator=torch.Generator().manual_seed(1)) * 0.1)
    kept = (branch.left[:, :4] @ branch.right[:4]).detach().double().numpy()
    for step in range(9):
        branch.advance(step, 32)
    assert int(branch.alive) == 4
    np.testing.assert_allclose((branch.left[:, :4] @ branch.right[:4]).detach().numpy(), kept, atol=1e-6)
    values = np.linalg.svd(kept, compute_uv=False)[:4]
    np.testing.assert_allclose(branch.left[:, :4].square().sum(0).detach().numpy(), values, rtol=1e-4)
    np.testing.assert_allclose(branch.right[:4].square().sum(1).detach().numpy(), values, rtol=1e-4)


def test_a_run_that_was_interrupted_between_phases_goes_on() -> None:
    branch, _, _ = student()
    for step in range(8):
        branch.advance(step, 32)
    state = {name: x.clone() for name, x in branch.state_dict().items()}
    branch.advance(8, 32)
    again, _, _ = student()
    again.load_state_dict(state)
    again.advance(8, 32)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in branch.state_dict().items())


@pytest.mark.parametrize(("rank", "found"), [(6, 4), (32, 16), (1, 1)])
def test_ranks_are_powers_of_two_that_the_weight_allows(rank: int, found: int) -> None:
    assert student(rank)[0].rank == found
