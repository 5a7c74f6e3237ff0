"""A tiny model that is fine-tuned, with samples, for the tests of this folder."""

import copy
from functools import cache

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.fine_tuning.distillation import Lesson, _weights
from fp4dit_ao.passes.fine_tuning.fine_tune import FineTuneConfig
from fp4dit_ao.passes.model_error import calls_of, teacher
from tests.graphs import DiTBlock


class TimedDiT(nn.Module):
    """Two blocks; what shifts their tokens is a linear of one vector per image, as modulation is."""

    def __init__(self, width: int = 128):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(DiTBlock(width, 2) for _ in range(2))
        self.time = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor]:
        shift = self.time(emb)[:, None]
        for block in self.blocks:
            hidden_states = block(hidden_states, shift)
        return (hidden_states,)


def samples(count: int = 4, width: int = 128) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "hidden_states": torch.randn(2, 5, width, generator=generator),
            "emb": torch.randn(2, width, generator=generator),
        }
        for _ in range(count)
    ]


def prepared(config: QuantConfig | None = None, model: nn.Module | None = None) -> GraphModule:
    """A calibrated graph of its own: of a :class:`TimedDiT`, quantized all over, unless said otherwise."""
    return _prepared(config, model) if model else copy.deepcopy(_of_the_model(config))


@cache
def _of_the_model(config: QuantConfig | None) -> GraphModule:
    return _prepared(config, TimedDiT())


def _prepared(config: QuantConfig | None, model: nn.Module) -> GraphModule:
    quantizer = FP4DiTQuantizer().set_global(config or QuantConfig(skip=()))
    graph = prepare_pt2e(capture(model.eval(), samples()[0]), quantizer)
    with torch.no_grad():
        for sample in samples():
            graph(**sample)
    return graph


def lesson(graph: GraphModule, config: FineTuneConfig | None = None) -> Lesson:
    """What a method is given, with all samples to train on."""
    calls = calls_of(graph, samples())
    targets = teacher(graph, calls)
    graph.requires_grad_(False)
    set_fake_quantize(graph, weight=True, activation=True)
    return Lesson(graph, calls, targets, config or FineTuneConfig(), _weights(graph))
