"""Grids: what observers and operators compute, element by element."""

import pytest
import torch
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

from fp4dit_ao.observers import BlockWeightObserver, CodebookWeightObserver, WeightObserver

OBSERVERS = [
    WeightObserver("e2m1", PerGroup(16)), WeightObserver("nf4", PerGroup(32), search="mse"), WeightObserver("e3m0", PerAxis(0)),
    WeightObserver("int4", PerTensor(), scale_dtype=torch.float16), BlockWeightObserver("e2m1", "e4m3"),
    BlockWeightObserver("e2m3", "e8m0"),
]  # fmt: skip


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: f"{o.fmt} {o.granularity}")
def test_nearest_codes_and_values_are_the_observers_own(observer, dtype) -> None:
    observer.scale = None
    w = weight(dtype)
    grid = observer.grid(w)
    assert grid.scale.shape == w.shape
    assert grid.scale.dtype == torch.float32
    assert (grid.scale > 0).all()
    assert torch.equal(grid.encode(w), observer.quantized(w)[0])
    assert torch.equal(grid.decode(grid.encode(w)).to(dtype), observer.dequantized(w))
    assert torch.equal(observer.grid(w).scale, grid.scale)


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: f"{o.fmt} {o.granularity}")
def test_columns_keep_their_scales(observer) -> None:
    observer.scale = None
    w = weight()
    grid = observer.grid(w)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(grid.columns(order).encode(w[:, order]), grid.encode(w)[:, order])
    assert torch.equal(grid.columns(slice(3, 4)).encode(w[:, 3:4]), grid.encode(w)[:, 3:4])


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: f"{o.fmt} {o.granularity}")
def test_brackets_enclose_the_weight(observer) -> None:
    observer.scale = None
    w = weight()
    grid = observer.grid(w)
    low, up = grid.bracket(w).low_codes, grid.bracket(w).up_codes
    lattice = observer.fmt.lattice.float() * grid.scale[..., None]
    clipped = w.clamp(lattice.amin(-1), lattice.amax(-1))
    tolerance = 1e-6 * grid.scale * observer.fmt.lattice_max
    assert (grid.decode(low) <= clipped + tolerance).all()
    assert (grid.decode(up) >= clipped - tolerance).all()
    assert torch.equal(grid.levels(low), grid.bracket(w).low)
    assert torch.equal(grid.levels(up), grid.bracket(w).up)
    assert (grid.bracket(w).step > 0).all()


@pytest.mark.parametrize(
    "observer", [*OBSERVERS, CodebookWeightObserver("e2m1_groups", 16)], ids=lambda o: str(o.fmt)[:12]
)
def test_rounding_and_neighbours_without_codes_are_those_with_codes(observer) -> None:
    observer.scale = None
    w = weight()
    grid = observer.grid(w)
    assert torch.equal(grid.round(w), grid.decode(grid.encode(w)))
    assert all(torch.equal(a, b) for a, b in zip(grid.neighbours(w), grid.bracket(w)[:3], strict=True))


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: f"{o.fmt} {o.granularity}")
def test_rescaled_grids_are_those_of_the_stored_scales_they_will_have(observer) -> None:
    observer.scale = None
    w = weight()
    grid = observer.grid(w)
    if isinstance(observer, BlockWeightObserver):
        assert grid.stored is None
        return
    factor = torch.rand(grid.stored.shape, generator=torch.Generator().manual_seed(1)).add(0.5).requires_grad_()
    changed = grid.rescaled(factor)
    observer.scale = changed.stored
    assert changed.stored.dtype == grid.stored.dtype
    assert torch.equal(changed.scale, observer.grid(w).scale)
    assert torch.equal(changed.encode(w), observer.quantized(w)[0])
    (gradient,) = torch.autograd.grad(changed.scale.sum(), factor)
    torch.testing.assert_close(gradient, grid.stored.float() * (w.numel() // factor.numel()))
