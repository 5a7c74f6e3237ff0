"""Q-GaLore's parts: 8-bit moments, INT8 weights, INT4 projections, and steps against Adam in numpy."""

import numpy as np
import pytest
import torch
from torchao.optim.quant_utils import create_dynamic_map

from fp4dit_ao.passes.fine_tuning import eight_bit_moments
from fp4dit_ao.passes.fine_tuning.int8_latent import Int8Latent
from fp4dit_ao.passes.fine_tuning.q_galore import SCALE, Layer, Projection, QGaLore


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_torchaos_8_bit_optimizers(signed: bool) -> None:
    torch.testing.assert_close(
        eight_bit_moments.dynamic_map(signed), torch.tensor(create_dynamic_map(signed)), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("signed", [True, False])
def test_moments_become_the_nearest_values_of_the_map(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    moment = torch.randn(37, 120, generator=generator) * torch.logspace(-6, 0, 120)
    moment = moment if signed else moment.abs()
    stored = eight_bit_moments.store(moment, signed)
    assert stored.codes.dtype == torch.uint8
    found, values = eight_bit_moments.restore(stored, signed), np.array(create_dynamic_map(signed))
    flat = moment.flatten().numpy()
    for start in range(0, len(flat), 256):
        block = flat[start : start + 256]
        scale = np.abs(block).max()
        wanted = values[np.abs(block[:, None] / scale - values).argmin(1)] * scale
        np.testing.assert_allclose(found.flatten().numpy()[start : start + 256], wanted, rtol=2e-5, atol=1e-12 * scale)
    small = moment[:1, :7]
    assert torch.equal(eight_bit_moments.restore(eight_bit_moments.store(small, signed), signed), small)


def test_int8_weights_are_within_half_a_step_and_take_tiny_updates_in_the_mean() -> None:
    value = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    latent = Int8Latent(value)
    step = (value.amax(1) - value.amin(1)) / 255
    assert bool(((latent.values() - value).abs() <= 0.501 * step[:, None]).all())
    before, codes = latent.values(), latent.codes.clone()
    latent.add(torch.zeros_like(value), torch.Generator().manual_seed(1))
    assert torch.equal(latent.codes, codes)
    update = torch.full_like(value, 0.02) * step[:, None]
    update[value == value.amax(1, keepdim=True)] = 0  # nothing leaves the range
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        latent.add(update, generator)
    moved = ((latent.values() - before) / step[:, None])[:, :].mean()
    assert float(moved) == pytest.approx(1.0, abs=5 * (0.02 * 0.98 * 50 / value.numel()) ** 0.5 + 0.02)


def test_int8_weights_whose_values_leave_the_range_get_another_one() -> None:
    latent = Int8Latent(
        torch.rand(4, 256, generator=torch.Generator().manual_seed(0)) + 1
    )  # all of one sign: 0 has a code
    assert float((latent.values() - 1.5).abs().max()) < 0.51
    wanted = latent.values().clone()
    wanted[0, 0] += 5
    update = torch.zeros_like(wanted)
    update[0, 0] = 5
    latent.add(update, torch.Generator().manual_seed(0))
    assert float((latent.values() - wanted).abs().max()) <= float(wanted[0, 0]) / 255 * 1.01
    assert torch.equal(latent.values()[1:], wanted[1:])


def test_the_gradient_of_an_int8_weight_arrives_and_nothing_is_kept() -> None:
    latent = Int8Latent(torch.randn(4, 64))
    seen: list[torch.Tensor] = []
    latent.receive = seen.append
    x = torch.randn(3, 64)
    (x @ latent().T).sum().backward()
    torch.testing.assert_close(seen[0], torch.ones(3, 4).T @ x)
    assert list(latent.parameters()) == []


@pytest.mark.parametrize("shape", [(3, 256), (256, 5), (7, 3)])
def test_projections_are_int4(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = Projection.of(matrix)
    assert found.parts["codes"].numel() == (matrix.numel() + 1) // 2
    spread = max(0.0, float(matrix.max())) - min(0.0, float(matrix.min()))
    assert float((found.matrix() - matrix).abs().max()) <= spread / 15 * 0.51 * 1.5
    assert len(found.matrix().unique()) <= 16 * len(found.parts["scale"])


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_steps_are_adams_in_the_subspace(shape: tuple[int, int]) -> None:
    """Against numpy in float64, with the INT4 matrix P that is near the singular vectors."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(shape[0], 2)) @ rng.normal(size=(2, shape[1]))
    gradients = [base + 0.01 * rng.normal(size=shape) for _ in range(6)]
    latent, taken = Int8Latent(torch.zeros(shape)), np.zeros(shape)

    def add(update: torch.Tensor, generator: torch.Generator) -> None:
        nonlocal taken
        taken = taken + update.double().numpy()

    latent.add = add  # type: ignore[method-assign]
    layer = Layer(latent, 1e-3, 2, 100, 0)
    wanted, first, second = np.zeros(shape), 0.0, 0.0
    for t, gradient in enumerate(gradients, 1):
        layer.receive(torch.tensor(gradient / 2, dtype=torch.float32))  # two samples' gradients add up
        layer.receive(torch.tensor(gradient / 2, dtype=torch.float32))
        layer.step(0.5)
        assert layer.projection is not None
        matrix = layer.projection.matrix().double().numpy()
        low = gradient @ matrix.T if shape[0] >= shape[1] else matrix.T @ gradient
        first, second = 0.9 * first + 0.1 * low, 0.999 * second + 0.001 * low**2
        step = first / (1 - 0.9**t) / np.sqrt(second / (1 - 0.999**t))
        wanted -= 0.5 * 1e-3 * SCALE * (step @ matrix if shape[0] >= shape[1] else matrix @ step)
    np.testing.assert_allclose(taken, wanted, rtol=1e-3, atol=1e-7)
    left, _, right = np.linalg.svd(gradients[0], full_matrices=False)
    vectors, found = (right[:2], matrix) if shape[0] >= shape[1] else (left[:, :2].T, matrix.T)
    assert np.abs((vectors * found).sum(1)).min() > 0.9


def test_a_subspace_that_stays_is_looked_for_less_and_less() -> None:
    """T = 2 doubles when five cosines are there, and again after each further one; a singular vector's sign does not count."""
    rng = np.random.default_rng(0)
    base = torch.tensor(rng.normal(size=(12, 8)), dtype=torch.float32)
    stays, turns = (Layer(Int8Latent(torch.zeros(12, 8)), 1e-3, 2, 2, 0) for _ in range(2))
    gaps = []
    for step in range(40):
        stays.receive(base * (-1) ** step)
        turns.receive(torch.tensor(rng.normal(size=(12, 8)), dtype=torch.float32).roll(step, 1))
        stays.step(1.0), turns.step(1.0)
        gaps.append(stays.gap)
    assert gaps[:11] == [2] * 10 + [4]  # decompositions at 0, 2, …, 10
    assert gaps[12] == 8 and gaps[16] == 16
    assert turns.gap == 2


def test_a_restored_optimizer_goes_on_with_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(96, 64, generator=generator) for _ in range(6)]

    def run(steps: slice, latent: Int8Latent, optimizer: QGaLore) -> None:
        for gradient in gradients[steps]:
            optimizer.zero_grad()
            optimizer.layers[0].receive(gradient)
            optimizer.step(0.5)

    def new() -> tuple[Int8Latent, QGaLore]:
        latent = Int8Latent(torch.randn(96, 64, generator=torch.Generator().manual_seed(1)))
        return latent, QGaLore([(latent, 1e-2)], 48, 4, 0)

    whole, optimizer = new()
    run(slice(0, 6), whole, optimizer)
    half, optimizer = new()
    run(slice(0, 3), half, optimizer)
    state, weights = optimizer.state(), {k: v.clone() for k, v in half.state_dict().items()}
    again, optimizer = new()
    again.load_state_dict(weights)
    optimizer.restore(state)
    run(slice(3, 6), again, optimizer)
    assert torch.equal(whole.values(), again.values())
    assert eight_bit_moments.SMALLEST <= 96 * 48  # the moments were 8 bits
