"""Latent weights: float weights that are trained through their own rounding.

    W^ = Q(V),    dL/dV = dL/dW^ where V lies within the levels, and 0 beyond them

(the straight-through estimator, arXiv 1308.3432). V starts at the float weight; where an earlier rounding settled on another
code than the nearest, at that code's value. Scales stay, or are trained as in LSQ (arXiv 1902.08153, eq. 3), where any positive
numbers would do:

    dW^/ds = Q(V)/s - V/s where V lies within the levels, and the outermost level beyond them.

Learning rates are in steps: the distance between neighbouring levels, in the mean over a layer's weights. It is EfficientDM's
scale-aware optimisation (arXiv 2310.03270) for any set of levels, and spares a user to know how large a model's weights are.
"""

from functools import partial

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid, WeightObserver
from fp4dit_ao.observers.base import StraightThrough
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.fine_tuning.int8_latent import Int8Latent
from fp4dit_ao.passes.fine_tuning.student import ParameterGroup, Student

SCALE_PACE = 1 / 8
"""Learning rate of a scale's logarithm over that of weights in steps. EfficientDM's code has 1e-6 (absolute) for scales and
``step / 2500`` for adapters: a ratio of 1/8 where steps are near 0.02."""


class LatentWeight(Student):
    """A weight that is rounded to nearest from something trained; subclasses say from what.

    Args:
        weight: float ``(out_features, in_features)``.
        observer: of that weight, with its scale found.
        learns_scale: whether scales are trained, where they are free numbers.

    Attributes:
        step: mean distance between the levels around each weight, in weight units.
        log_scale: float32, the logarithm of what stored scales are multiplied by, shaped like them; None where they stay.
    """

    start: Tensor | None
    log_scale: nn.Parameter | None

    def __init__(self, weight: Tensor, observer: WeightObserver, learns_scale: bool = True):
        super().__init__()
        codes, scale = observer.quantized(weight)
        self._stored_scale, self.dtype = scale, weight.dtype
        self._weight = weight
        self._find_grid = partial(observer.grid, weight)  # made anew when needed: it holds a scale for every weight
        grid = self._find_grid()
        around = grid.bracket(weight)
        self.step = float((around.step * grid.scale).mean())
        learned = observer.codes is not None
        self.register_buffer("start", _moved_to(codes, weight, grid) if learned else None, persistent=False)
        stored = grid.stored if learns_scale else None
        self.log_scale = None if stored is None else nn.Parameter(torch.zeros_like(stored, dtype=torch.float32))

    def latent(self) -> Tensor:
        """V, float32, differentiable in what is trained."""
        raise NotImplementedError

    def beside(self, latent: Tensor, value: Tensor) -> Tensor:
        """The rounded weight with what stands beside it while it is trained, and is gone at the end."""
        return value

    def grid(self) -> Grid:
        """The values that the weight can take now."""
        grid = self._find_grid()
        return grid if self.log_scale is None else grid.rescaled(self.log_scale.exp())

    def started(self) -> Tensor:
        """Where V starts, in float32."""
        return (self._weight if self.start is None else self.start).float()

    def forward(self, weight: Tensor) -> Tensor:
        grid, latent = self.grid(), self.latent()
        return self.beside(latent, straight_through(grid, latent, self.log_scale is not None)).to(self.dtype)

    @torch.no_grad()
    def settled(self) -> Settled:
        grid = self.grid()
        scale = self._stored_scale
        if self.log_scale is not None:
            assert grid.stored is not None
            scale = grid.stored.reshape(scale.shape)
        return Settled(grid.encode(self.latent()), scale)

    def groups(self, lr: float) -> list[ParameterGroup]:
        return [] if self.log_scale is None else [{"params": [self.log_scale], "lr": lr * SCALE_PACE}]


def straight_through(grid: Grid, latent: Tensor, learns_scale: bool) -> Tensor:
    """``Q(latent)`` (float32) with the gradients of this module's docstring."""
    position = grid.position(latent)
    with torch.no_grad():
        rounded = grid.round(latent)
    if not learns_scale:
        value: Tensor = StraightThrough.apply(position * grid.scale, rounded)  # type: ignore[no-untyped-call]
        return value
    level = (rounded / grid.scale).detach()
    return (position + (level - position).detach()) * grid.scale


@torch.no_grad()
def _moved_to(codes: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    """``weight``, and the value of its code where rounding to nearest would give another."""
    same = grid.levels(grid.encode(weight)) == grid.levels(codes)
    return torch.where(same, weight, grid.decode(codes).to(weight.dtype))


class FullWeight(LatentWeight):
    """Every element of a weight, trained.

    Args:
        by: what trains it, one of ``fine_tune.OPTIMIZERS``.
    """

    def __init__(self, weight: Tensor, observer: WeightObserver, by: str = "adam", learns_scale: bool = True):
        super().__init__(weight, observer, learns_scale)
        self.value: nn.Parameter | Int8Latent = (
            Int8Latent(self.started()) if by == "q_galore" else nn.Parameter(self.started().clone())
        )

    def latent(self) -> Tensor:
        value: Tensor = self.value() if isinstance(self.value, Int8Latent) else self.value
        return value

    def groups(self, lr: float) -> list[ParameterGroup]:
        own: list[ParameterGroup] = (
            [] if isinstance(self.value, Int8Latent) else [{"params": [self.value], "lr": lr * self.step}]
        )
        return own + super().groups(lr)

    def latents(self, lr: float) -> list[tuple[Int8Latent, float]]:
        return [(self.value, lr * self.step)] if isinstance(self.value, Int8Latent) else []
