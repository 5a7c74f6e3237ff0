"""Linears that read one value become one product, and every output keeps its bits."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, lower, unpack_weights, w4a6, w4a6_codebook, w4a8
from fp4dit_ao.passes.block_outlining import outline
from fp4dit_ao.passes.compilation import compile_graph
from fp4dit_ao.passes.joined_linears import join_linears
from tests.graphs import TinyDiT, show, tiny_sample

LINEAR = torch.ops.aten.linear.default


class Block(nn.Module):
    """Attention to itself with half the heads in k and v, then attention to a text; k has no bias."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(width, width // 2, bias=False)
        self.to_v = nn.Linear(width, width // 2)
        self.text_q, self.text_k, self.text_v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        x = x + F.softmax(q[..., :64] @ k.mT, -1) @ torch.cat([v, v], -1)
        return x + F.softmax(self.text_q(x) @ self.text_k(text).mT, -1) @ self.text_v(text)


class Blocks(nn.Module):
    def __init__(self, layers: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


def texts(batch: int = 2, tokens: int = 7, words: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = {"x": (batch, tokens, 128), "text": (batch, words, 128)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def lowered(model: nn.Module, sample: dict[str, Tensor], config: QuantConfig | None, **layers: Any) -> GraphModule:
    quantizer = FP4DiTQuantizer().set_global(config or w4a6_codebook())
    for glob, other in layers.items():
        quantizer.set_module_name(f"*{glob}", other)
    return lower(convert_pt2e(prepare_pt2e(capture(model.eval(), sample), quantizer)))


def products(graph: GraphModule) -> list[str]:
    """Weights of the linears, in order."""
    return [str(node.args[1].target) for node in graph.graph.nodes if node.target is LINEAR]


def test_the_rewrite() -> None:
    joined = join_linears(lowered(Blocks(layers=1), texts(), None))
    lines = show(joined).replace("blocks_0_", "").splitlines()
    kept = [line for line in lines if " = linear(" in line or "slice.Tensor(linear" in line]
    assert_expected_inline(
        "\n".join(kept),
        """\
linear_default = linear(x, to_q_joined_weight, to_q_joined_bias)
slice_tensor = slice.Tensor(linear_default, -1, 0, 128)
slice_tensor_1 = slice.Tensor(linear_default, -1, 128, 192)
slice_tensor_2 = slice.Tensor(linear_default, -1, 192, 256)
linear_3 = linear(add, text_q_weight)
linear_default_1 = linear(text, text_k_joined_weight)
slice_tensor_3 = slice.Tensor(linear_default_1, -1, 0, 128)
slice_tensor_4 = slice.Tensor(linear_default_1, -1, 128, 256)""",
    )


@pytest.mark.parametrize(
    ("config", "form"),
    [(w4a6_codebook(), "packed"), (w4a6_codebook(), "int8"), (w4a6(), "packed"), (w4a6(), "int8"), (w4a8(), "packed"),
     (replace(w4a6(), weight_granularity="channel", scale_dtype="float16"), "packed")],
    ids=["codebook", "codebook, int8", "w4a6", "w4a6, int8", "w4a8", "channel, float16 scales"],
)  # fmt: skip
@torch.no_grad()
def test_every_output_has_the_bits_it_had(config: QuantConfig, form: str) -> None:
    graph = lowered(Blocks(layers=1), texts(), config)
    if form == "int8":
        unpack_weights(graph, "int8")
    samples = [texts(), texts(1, 1, 1), texts(2, 70, 40)]
    expected = [graph(**sample) for sample in samples]
    joined = join_linears(graph)
    assert (len(products(graph)), len(products(joined))) == (6, 3)
    for sample, before in zip(samples, expected, strict=True):
        assert torch.equal(joined(**sample), before)
        assert torch.equal(graph(**sample), before), "its weights are views now"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"to_k": None}, ["to_q.joined_weight", "to_k.weight"]),
        ({"to_v": replace(w4a6(), group_size=64)}, ["to_q.joined_weight", "to_v.weight"]),
        ({"to_q": w4a8()}, ["to_q.weight", "to_k.joined_weight"]),
        ({"to_q": w4a6_codebook()}, ["to_q.weight", "to_k.joined_weight"]),
        ({"to_?": replace(w4a6(), activation=None)}, ["to_q.weight", "to_k.weight", "to_v.weight"]),
        ({"to_?": replace(w4a6(), weight_granularity="tensor")}, ["to_q.weight", "to_k.weight", "to_v.weight"]),
    ],
    ids=["kept in high precision", "group size", "input format", "scheme", "float product", "one scale for all"],
)
@torch.no_grad()
def test_what_cannot_be_one_weight_stays(changed: dict[str, QuantConfig | None], expected: list[str]) -> None:
    graph = lowered(Blocks(layers=1), texts(), w4a6(), **changed)
    before = graph(**texts())
    joined = join_linears(graph)
    names = [name.removeprefix("blocks.0.") for name in products(joined)]
    assert names == [*expected, "text_q.weight", "text_k.joined_weight"]
    assert torch.equal(joined(**texts()), before)


@torch.no_grad()
def test_names_stay_and_no_weight_is_in_memory_twice() -> None:
    graph = lowered(Blocks(layers=1), texts(), None)
    before = {name: x.detach().clone() for name, x in graph.state_dict().items()}
    joined = join_linears(graph)
    assert graph.state_dict().keys() == before.keys()
    own, new = dict(graph.named_parameters()), dict(joined.named_parameters())
    for name in before:
        found, expected = own[name].detach(), before[name]
        if hasattr(expected, "qdata"):
            assert all(torch.equal(getattr(found, part), getattr(expected, part)) for part in found.tensor_data_names)
    whole = new["blocks.0.to_q.joined_weight"].detach()
    for name in ("to_q", "to_k", "to_v"):
        part = own[f"blocks.0.{name}.weight"].detach()
        for data in ("qdata", "index", "row_scale"):
            assert getattr(part, data).untyped_storage().data_ptr() == getattr(whole, data).untyped_storage().data_ptr()
    missing = new["blocks.0.to_q.joined_bias"][128:192]
    assert not missing.any() and missing.signbit().all(), "x + -0.0 is x, also where x is -0.0"
    own["blocks.0.to_v.bias"].add_(1)  # of the graph, and so of what was compiled
    assert torch.equal(new["blocks.0.to_q.joined_bias"][-64:], own["blocks.0.to_v.bias"])


@torch.no_grad()
def test_joining_again_gives_the_same() -> None:
    graph = lowered(Blocks(layers=1), texts(), None)
    first, second = join_linears(graph), join_linears(graph)
    assert products(first) == products(second)
    assert torch.equal(first(**texts()), second(**texts()))


@torch.no_grad()
def test_blocks_stay_alike() -> None:
    graph = lowered(TinyDiT(layers=3), tiny_sample(3, 17), None)
    outlined = outline(join_linears(graph))
    calls = [node.target for node in outlined.graph.nodes if node.op == "call_module"]
    assert calls == ["block_0"] * 3
    sample = tiny_sample(2, 5)
    assert torch.equal(outlined(**sample)[0], graph(**sample)[0])


@torch.no_grad()
def test_a_compiled_graph_calls_one_product_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo and AOTAutograd make the graph that Inductor gets; it is run without waiting for that to compile."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda body, options, **how: compiler(body, backend="aot_eager", **how))
    graph, sample = lowered(TinyDiT(), tiny_sample(3, 17), None), tiny_sample(3, 17)
    outputs, counts = [], []
    for joined in (False, True):
        run = compile_graph(graph, joined=joined)
        run(**sample)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            outputs.append(run(**sample)[0])
        counts.append(Counter(event.name for event in profile.events())["fp4dit_ao::codebook_linear"])
    assert counts == [6, 4]
    assert torch.equal(*outputs)
