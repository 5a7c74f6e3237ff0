"""Blocks that are alike share one body, compiled once; the outlined graph computes the same bits."""

from dataclasses import replace

import diffusers
import pytest
import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import SMALL, other_size, quantize
from fp4dit_ao import FP4DiTQuantizer, capture, example_inputs, lower, w4a6
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline
from fp4dit_ao.passes.compilation import compile_blocks
from tests.graphs import TinyDiT, tiny_sample


@torch.no_grad()
def lowered(layers: int = 3, **names: object) -> GraphModule:
    quantizer = FP4DiTQuantizer().set_global(w4a6())
    for glob, config in names.items():
        quantizer.set_module_name(glob.replace("_", "."), config)
    sample = tiny_sample(batch=3, tokens=17)
    return lower(convert_pt2e(prepare_pt2e(capture(TinyDiT(layers=layers), sample), quantizer)))


@torch.no_grad()
def test_the_outlined_graph_is_the_graph() -> None:
    graph = lowered()
    outlined = outline(graph)
    for batch, tokens in [(3, 17), (2, 5)]:
        sample = tiny_sample(batch, tokens)
        assert torch.equal(outlined(**sample)[0], graph(**sample)[0])
    before, after = dict(graph.named_parameters()), dict(outlined.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before), "tensors are shared, not copied"


def test_every_block_calls_one_body() -> None:
    outlined = outline(lowered(layers=4))
    calls = [node.target for node in outlined.graph.nodes if node.op == "call_module"]
    assert calls == ["block_0"] * 4
    assert list(kinds_of_blocks(outlined)) == ["block_0"]
    assert not list(outlined.block_0.parameters()), "weights are arguments"


@pytest.mark.parametrize(
    ("changed", "calls"),
    [
        ({"blocks_1_*": None}, ["block_0", "block_0"]),  # not quantized: lies between blocks
        ({"blocks_1_ff_*": None}, ["block_0", "block_1", "block_0"]),
        ({"blocks_1_*": replace(w4a6(), weight="e1m2")}, ["block_0", "block_1", "block_0"]),
        ({"blocks_1_*": replace(w4a6(), group_size=64)}, ["block_0", "block_1", "block_0"]),
        ({"blocks_1_*": replace(w4a6(), scale_dtype="float16")}, ["block_0", "block_1", "block_0"]),
        ({"blocks_1_*": replace(w4a6(), attention=None)}, ["block_0", "block_1", "block_0"]),
    ],
    ids=["kept", "part kept", "format", "group", "scale type", "attention"],
)
@torch.no_grad()
def test_blocks_that_differ_do_not_share(changed: dict, calls: list[str]) -> None:
    graph = lowered(**changed)
    outlined = outline(graph)
    assert [node.target for node in outlined.graph.nodes if node.op == "call_module"] == calls
    sample = tiny_sample(2, 9)
    assert torch.equal(outlined(**sample)[0], graph(**sample)[0])


@torch.no_grad()
def test_a_model_without_blocks_is_one() -> None:
    block = TinyDiT(layers=1).blocks[0]
    example = {"x": torch.randn(2, 6, 128), "shift": torch.randn(2, 1, 128)}
    graph = lower(convert_pt2e(prepare_pt2e(capture(block, example), FP4DiTQuantizer().set_global(w4a6()))))
    outlined = outline(graph)
    assert list(kinds_of_blocks(outlined)) == ["block_0"]
    assert torch.equal(outlined(**example), graph(**example))


@pytest.mark.parametrize(
    ("family", "layers", "kinds"),
    [
        ("PixArt-Σ", 3, [0, 0, 0]),  # the mask is repeated for every head: a size that all blocks need
        ("Hunyuan-DiT", 6, [0, 0, 0, 0, 1, 1]),  # long skips enter the last two
        ("DiT", 3, [0, 0, 0]),  # the end of the model reads the first block's embedder once more
        ("Wan", 3, [0, 0, 0]),  # each block converts the rotary table to the type that it has
        ("CogVideoX, rotary", 3, [0, 0, 1]),  # the last block's text is read by nobody
    ],
)
@torch.no_grad()
def test_blocks_of_a_family_are_alike(family: str, layers: int, kinds: list[int]) -> None:
    name, config = SMALL[family]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config | {"num_layers": layers}).eval()
    graph = quantize(model, capture(model, example_inputs(model))).graph
    nodes = [str(node) for node in graph.graph.nodes]
    outlined = outline(graph)
    calls = [node.target for node in outlined.graph.nodes if node.op == "call_module"]
    assert calls == [f"block_{kind}" for kind in kinds]
    assert [str(node) for node in graph.graph.nodes] == nodes, "the given graph stays as it is"
    other = example_inputs(model, other_size(family), seed=1)
    for expected, found in zip(graph(**other), outlined(**other), strict=True):
        assert torch.equal(expected, found)


@torch.no_grad()
def test_blocks_are_compiled_once_for_all_and_every_size() -> None:
    graph = lowered(layers=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = compile_blocks(graph)
    for batch, tokens in [(3, 17), (2, 5), (4, 30)]:
        sample = tiny_sample(batch, tokens)
        expected = graph(**sample)[0]
        difference = (compiled(**sample)[0] - expected).norm() / expected.norm()
        assert difference < 2e-2  # a last-bit difference can move an activation across a rounding boundary
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
