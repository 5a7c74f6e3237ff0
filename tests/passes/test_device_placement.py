"""A graph captured on one device runs on another."""

import pytest
import torch
from torch import Tensor, nn

from fp4dit_ao import capture
from fp4dit_ao.passes.device_placement import move_to


class MakesTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)
        return self.linear(x) + position[:, None].to(x.device)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_captured_on_meta_runs_elsewhere(device) -> None:
    model = MakesTensors()
    weights = model.state_dict()
    graph = capture(MakesTensors().to("meta"), {"x": torch.empty(2, 3, 4, device="meta")})
    assert "meta" in graph.code
    graph.load_state_dict(weights, assign=True)
    move_to(graph, device)
    assert "meta" not in graph.code
    x = torch.randn(5, 7, 4, device=device)
    assert torch.equal(graph(x), model.to(device)(x))
