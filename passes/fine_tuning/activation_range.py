"""Static input ranges that are trained: a factor on the scale of each, as in LSQ (arXiv 1902.08153, eq. 3).

    dX^/ds = Q(X)/s - X/s where X lies within the range, and the outermost level beyond it

EfficientDM (arXiv 2310.03270) and QuEST (arXiv 2402.03666) have such a step for each timestep. Here it is one for all: a
converted graph's scale is a constant, and recipes quantize inputs token by token, by their own largest magnitude, which
follows the timestep by itself and leaves nothing to train.
"""

import torch
from torch import Tensor, nn

from fp4dit_ao.observers import Grid
from fp4dit_ao.observers.activation import StaticActivationObserver
from fp4dit_ao.passes.fine_tuning.latent_weight import straight_through

RANGE_PACE = 0.1
"""Learning rate of a range's logarithm over that of weights in steps."""


class TunedRange(nn.Module):
    """A static range with a trained factor, in the place of its observer's.

    Args:
        observer: calibrated.

    Attributes:
        log_factor: float32 scalar, the logarithm of the factor on the range, 0 at first.
    """

    def __init__(self, observer: StaticActivationObserver):
        super().__init__()
        self._observer = (observer,)  # not a submodule: it holds this module
        self.log_factor = nn.Parameter(torch.zeros((), device=observer.absmax.device))

    @property
    def observer(self) -> StaticActivationObserver:
        """The observer of the range."""
        return self._observer[0]

    def forward(self, x: Tensor) -> Tensor:
        scale = self.observer.scale(x.ndim) * self.log_factor.exp()
        return straight_through(Grid(self.observer.fmt, scale), x, learns_scale=True).to(x.dtype)

    @torch.no_grad()
    def settle(self) -> Tensor | None:
        """Gives the observer the range that was learned; returns its old factor."""
        old, learned = self.observer.factor, self.log_factor.exp()
        self.observer.factor = learned if old is None else old * learned
        return old


def tuned_ranges(prepared: nn.Module) -> list[TunedRange]:
    """One for each static range of a prepared graph; none where inputs are quantized online."""
    return [TunedRange(module) for module in prepared.modules() if isinstance(module, StaticActivationObserver)]
