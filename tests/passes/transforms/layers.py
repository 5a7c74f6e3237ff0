"""What tests of input transforms share: two linears of one input, their quantization, and a relative error."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, lower


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


@torch.no_grad()
def quantized(graph: GraphModule, config: QuantConfig, sample: dict[str, Tensor]) -> GraphModule:
    """The lowered graph, observed on one sample."""
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))
    prepared(**sample)
    return lower(convert_pt2e(prepared, fold_quantize=False))
