"""A graph cut into segments computes what it computed whole."""

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, _compat, capture, w4a6
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.partition import Segment, partition
from tests.graphs import DiTBlock, TinyDiT, tiny_sample


def prepare(model: nn.Module, sample: dict) -> torch.fx.GraphModule:
    prepared = prepare_pt2e(capture(model, sample), FP4DiTQuantizer().set_global(w4a6()))
    with torch.no_grad():
        prepared(**sample)
    return prepared


def run(segments: list[Segment], values: dict) -> dict:
    for segment in segments:
        outputs = segment.graph(*[values[name] for name in segment.inputs])
        values.update(zip(segment.outputs, outputs, strict=True))
        for name in segment.dead:
            del values[name]
    return values


@pytest.mark.parametrize("fake_quantize", [False, True])
@torch.no_grad()
def test_run_in_pieces_is_run_whole(fake_quantize) -> None:
    sample = tiny_sample()
    prepared = prepare(TinyDiT(layers=3), sample)
    set_fake_quantize(prepared, fake_quantize, fake_quantize)
    values = run(partition(prepared), _compat.flat_inputs(prepared, sample))
    (output,) = (x for x in values.values() if isinstance(x, Tensor))
    assert torch.equal(output, prepared(**sample)[0])


def test_blocks_and_glue_alternate() -> None:
    names = [segment.name for segment in partition(prepare(TinyDiT(layers=3), tiny_sample()))]
    assert names == ["(glue)", "blocks.0", "blocks.1", "blocks.2", "(glue)"]


def test_every_weight_observer_lies_in_a_block() -> None:
    segments = partition(prepare(TinyDiT(layers=2), tiny_sample()))
    assert [len(segment.observers) for segment in segments] == [0, 6, 6, 0]


def test_values_die_after_their_last_use() -> None:
    segments = partition(prepare(TinyDiT(layers=2), tiny_sample()))
    alive: set[str] = {"hidden_states", "shift"}
    for segment in segments:
        assert set(segment.inputs) <= alive
        alive |= set(segment.outputs)
        alive -= set(segment.dead)
    assert len(alive) == 1


class Skipping(nn.Module):
    """A long skip connection, as Hunyuan-DiT's: a value lives across blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(DiTBlock(128, 2) for _ in range(3))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        first = self.blocks[0](x, shift)
        return self.blocks[2](self.blocks[1](first, shift) + first, shift)


@torch.no_grad()
def test_a_long_skip_stays_alive_until_it_is_used() -> None:
    sample = {"x": torch.randn(2, 5, 128), "shift": torch.randn(2, 1, 128)}
    prepared = prepare(Skipping(), sample)
    segments = partition(prepared)
    skip = segments[0].outputs[0]
    assert skip not in segments[1].dead
    values = run(segments, _compat.flat_inputs(prepared, sample))
    assert any(isinstance(x, Tensor) and torch.equal(x, prepared(**sample)) for x in values.values())


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_without_blocks_the_graph_is_one_segment() -> None:
    (segment,) = partition(prepare(Flat(), {"x": torch.randn(2, 128)}))
    assert segment.name == "(model)"
    assert len(segment.observers) == 2


class Interleaved(nn.Module):
    """Block 0 runs again after block 1: there is no order of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[1](self.blocks[0](x)))


@torch.no_grad()
def test_interleaved_blocks_are_one_segment() -> None:
    sample = {"x": torch.randn(2, 128)}
    prepared = prepare(Interleaved(), sample)
    segments = partition(prepared)
    assert [segment.name for segment in segments] == ["(model)"]
    values = run(segments, _compat.flat_inputs(prepared, sample))
    assert any(isinstance(v, Tensor) and torch.equal(v, prepared(**sample)) for v in values.values())
