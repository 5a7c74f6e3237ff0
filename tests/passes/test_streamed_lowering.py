"""Converting and lowering weight by weight gives what the two passes give one after the other."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, lower, w4a6
from fp4dit_ao.checkpoint.graph_tensors import flatten, state_of
from fp4dit_ao.config import nvfp4, w4a6_codebook
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.streamed_lowering import convert_and_lower
from fp4dit_ao.util.tensor_state import bytes_of
from tests.graphs import TinyDiT, tiny_sample


def prepared_graph(config: QuantConfig) -> torch.fx.GraphModule:
    sample = tiny_sample()
    graph = prepare_pt2e(capture(TinyDiT(), sample), FP4DiTQuantizer().set_global(config))
    with torch.no_grad():
        graph(**sample)
    return graph


def tensors(graph: torch.fx.GraphModule) -> dict[str, Tensor]:
    state = state_of(graph)
    return {part: y for name, x in state.items() for part, y in flatten(name, x.detach()).items()}


@pytest.mark.parametrize("config", [w4a6(), w4a6_codebook(), nvfp4(), replace(w4a6(), activation_granularity="tensor")])
def test_the_same_graph_and_bits(config: QuantConfig) -> None:
    prepared = prepared_graph(config)
    for _, observer in list(weight_observers(prepared))[:1]:  # one weight has a rounding that was learned
        observer.codes = torch.zeros(128, 128, dtype=torch.uint8)
    expected = lower(convert_pt2e(copy.deepcopy(prepared), fold_quantize=False))
    found = convert_and_lower(prepared)
    assert [str(n.target) for n in found.graph.nodes] == [str(n.target) for n in expected.graph.nodes]
    wanted = tensors(expected)
    assert tensors(found).keys() == wanted.keys()
    assert all(bytes_of(x) == bytes_of(wanted[name]) for name, x in tensors(found).items())
    assert dict(found.named_buffers()).keys() == dict(expected.named_buffers()).keys()  # no codes are left behind
    assert found.eval() is found


def test_the_float_model_shares_nothing_with_the_graph() -> None:
    model, sample = TinyDiT(), tiny_sample()
    prepared = prepare_pt2e(capture(model, sample), FP4DiTQuantizer().set_global(w4a6()))
    before = model.proj_out.weight.detach().clone()
    lowered = convert_and_lower(prepared)
    with torch.no_grad():
        lowered.get_parameter("proj_out.weight").zero_()
    assert torch.equal(model.proj_out.weight, before)
    assert isinstance(model.blocks[0].ff.up.weight, torch.nn.Parameter)  # and it still has its weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [w4a6(), replace(w4a6(), activation=None), nvfp4()])
def test_weights_in_host_memory_are_rounded_on_the_gpu(config: QuantConfig) -> None:
    prepared = prepared_graph(config)
    expected = tensors(convert_and_lower(copy.deepcopy(prepared)))
    found = tensors(convert_and_lower(prepared, torch.device("cuda")))
    assert {x.device.type for x in found.values()} == {"cpu"}
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
