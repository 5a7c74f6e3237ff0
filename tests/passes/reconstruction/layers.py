"""One linear with correlated inputs and large channels, as a prepared graph: methods are measured on it, on held-out inputs."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, ReconstructionConfig, capture, reconstruct
from fp4dit_ao.config import RECIPES
from fp4dit_ao.passes.reconstruction.report import ReconstructionReport

WIDTH, OUT = 128, 32


class Layer(nn.Module):
    """``fc(x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def inputs(seed: int, tokens: int, mixing: Tensor) -> dict[str, Tensor]:
    """Two rows of correlated tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, tokens, mixing.shape[0], generator=generator) @ mixing}


class Problem:
    """A linear, eight samples to calibrate on, and one to judge by.

    Args:
        recipe: name of the number formats.
        seed: of weight and inputs.
        **changes: of the recipe.

    Attributes:
        prepared: the graph with observers, calibrated.
    """

    def __init__(self, recipe: str, seed: int = 0, **changes: Any):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(48, WIDTH, generator=generator) / 7
        mixing[:, :: WIDTH // 4] *= 4
        torch.manual_seed(seed)
        self.model = Layer().eval()
        self.config: QuantConfig = replace(RECIPES[recipe](), skip=(), **changes)
        self.samples = [inputs(100 * seed + i, 24, mixing) for i in range(8)]
        self.held_out = inputs(100 * seed + 99, 128, mixing)
        with torch.no_grad():
            quantizer = FP4DiTQuantizer().set_global(self.config)
            self.prepared = prepare_pt2e(capture(self.model, self.samples[0]), quantizer)
            for sample in self.samples:
                self.prepared(**sample)

    def reconstruct(self, rounding: str, **settings: Any) -> tuple[GraphModule, ReconstructionReport]:
        """A copy of the graph, rounded by a method, and its report."""
        prepared = copy.deepcopy(self.prepared)
        settings = {"iters": 200, "batch_size": 8} | settings
        report = reconstruct(prepared, self.samples, ReconstructionConfig(rounding, **settings), progress=False)
        return prepared, report

    @torch.no_grad()
    def error(self, prepared: GraphModule) -> float:
        """Relative squared error of the converted graph's output on held-out inputs."""
        expected = self.model(**self.held_out)
        found = convert_pt2e(copy.deepcopy(prepared))(**self.held_out)
        return float((found - expected).square().mean() / expected.square().mean())
