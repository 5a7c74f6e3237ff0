"""What tests of input transforms share: two linears of one input, and a relative error."""

from torch import Tensor, nn


class Layer(nn.Module):
    """Two projections of one input."""

    def __init__(self, width: int = 128, out: int = 32):
        super().__init__()
        self.one, self.two = nn.Linear(width, out), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) - self.two(x)


def relative(x: Tensor, reference: Tensor) -> float:
    """``||x - reference|| / ||reference||``."""
    return float((x - reference).norm() / reference.norm())
