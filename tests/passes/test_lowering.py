"""The lowered model computes what the converted graph does, linear by linear, and compiles in one piece."""

import copy
import gc
import warnings
from dataclasses import replace

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, MinifloatTensor, QuantConfig, capture, lower, w4a6, w4a8
from fp4dit_ao.checkpoint.graph_tensors import flatten
from fp4dit_ao.config import int_w4a4, int_w4a6, w4a4
from tests.graphs import TinyDiT, tiny_sample

LINEAR = torch.ops.aten.linear.default


class EveryLinear(torch.fx.Interpreter):
    """Runs a graph and keeps each linear's input and output."""

    def __init__(self, graph: torch.fx.GraphModule):
        super().__init__(graph)
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def run_node(self, node: torch.fx.Node):
        result = super().run_node(node)
        if node.target is LINEAR:
            self.seen.append((self.fetch_args_kwargs_from_env(node)[0], result))
        return result


def converted(config: QuantConfig, dtype: torch.dtype = torch.float32) -> tuple[torch.fx.GraphModule, dict]:
    sample = {k: v.to(dtype) for k, v in tiny_sample(batch=3, tokens=17).items()}
    graph = capture(TinyDiT(layers=2).to(dtype), sample)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))
    with torch.no_grad():
        prepared(**sample)
    return convert_pt2e(prepared), sample


@pytest.mark.parametrize(
    "config",
    [w4a6(), w4a8(), int_w4a6(), w4a4(), int_w4a4(), replace(w4a6(), activation_granularity="tensor"),
     replace(w4a6(), activation=None), replace(w4a6(), weight_granularity="channel", attention=None),
     replace(w4a6(), scale_dtype="float16")],
    ids=["w4a6", "w4a8", "int", "w4a4", "int w4a4", "static", "weight-only", "channel", "float16 scales"],
)  # fmt: skip
@torch.no_grad()
def test_linear_by_linear(config) -> None:
    graph, sample = converted(config)
    lowered = lower(graph)
    reference, fast = EveryLinear(graph), EveryLinear(lowered)
    inputs = [*sample.values()]
    out = lowered(**sample)[0]
    assert torch.isfinite(out).all()
    reference.run(*inputs, False)
    weights = [n for n in lowered.graph.nodes if n.target is LINEAR]
    assert len(weights) == len(reference.seen)
    low_bit = 0
    for node, (args, expected) in zip(weights, reference.seen, strict=True):
        weight = lowered.get_parameter(str(node.args[1].target))
        low_bit += isinstance(weight, MinifloatTensor)
        # the lowered linear quantizes its own input, so both start from the same tensor: the converted graph's
        # already quantized one, which is a fixed point of quantization up to the last bit of its scale
        got = torch.nn.functional.linear(args[0], weight, args[2])
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max() * 4
    assert low_bit == 12
    fast.run(*inputs, False)


@torch.no_grad()
def test_nothing_is_warned_of_that_a_user_cannot_change() -> None:
    """Copying a graph makes torch warn of a class of its own."""
    graph, _ = converted(w4a6())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower(graph)


@torch.no_grad()
def test_a_whole_model_agrees() -> None:
    graph, sample = converted(w4a6())
    expected = graph(**sample)[0]
    difference = (lower(graph)(**sample)[0] - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


@torch.no_grad()
def test_compiles_whole_and_dynamic() -> None:
    graph, _ = converted(w4a6())
    lowered = lower(graph)
    compiled = torch.compile(lowered, fullgraph=True, dynamic=True)
    torch._dynamo.config.error_on_recompile = True
    try:
        for batch, tokens in [(3, 17), (2, 5), (4, 30)]:
            sample = tiny_sample(batch, tokens)
            expected = lowered(**sample)[0]
            difference = (compiled(**sample)[0] - expected).norm() / expected.norm()
            # a last-bit difference can move an activation across a rounding boundary: 1/60 of a token's range
            assert difference < 2e-2
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_state_dict_has_the_originals_keys_and_no_float_copy() -> None:
    graph, _ = converted(w4a6())
    state = lower(graph).state_dict()
    assert set(state) == set(TinyDiT(layers=2).state_dict())
    assert sum(isinstance(v, MinifloatTensor) for v in state.values()) == 12
    assert not any(buffer.endswith(("_codes", "_scale")) for buffer in state)


def test_the_converted_graph_is_left_alone() -> None:
    graph, _ = converted(w4a6())
    before = copy.deepcopy(graph.state_dict())
    code = graph.code
    lower(graph)
    assert graph.code == code
    assert all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())


@torch.no_grad()
def test_bfloat16_runs() -> None:
    graph, sample = converted(w4a6(), torch.bfloat16)
    out = lower(graph)(**sample)[0]
    expected = graph(**sample)[0]
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected.float()).norm() / expected.float().norm() < 0.05


@torch.no_grad()
def test_re_export() -> None:
    graph, sample = converted(w4a6())
    lowered = lower(graph)
    again = torch.export.export(lowered, (), sample | {"return_dict": False}, strict=False).module()
    assert torch.equal(again(**sample, return_dict=False)[0], lowered(**sample)[0])


def test_attention_that_ours_cannot_do_stays_pytorchs() -> None:
    """Causal attention keeps its operator, on fake-quantized inputs; plain attention becomes ours."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2)
            return plain + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    sample = {name: torch.randn(2, 3, 5, 16) for name in "qkv"}
    with torch.no_grad():
        graph = convert_pt2e(prepare_pt2e(capture(Model(), sample), FP4DiTQuantizer().set_global(w4a6())))
        lowered = lower(graph)
        assert torch.allclose(lowered(**sample), graph(**sample), rtol=1e-5, atol=1e-6)
    targets = [str(node.target) for node in lowered.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 1
    assert targets.count("fp4dit_ao.attention.default") == 1
    assert targets.count("fp4dit_ao.fake_quantize.default") == 3


def live_bytes(known: set[int] = frozenset()) -> dict[int, int]:
    """Bytes of every plain tensor that is alive, by address; those in ``known`` left out."""
    gc.collect()
    plain = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in plain}
    return {address: size for address, size in storages.items() if address and address not in known}


def test_the_lowered_graph_keeps_nothing_else_alive() -> None:
    """Neither float weights nor a byte per code: torchao's caches and annotations would hold every earlier graph."""
    model, sample = TinyDiT(width=256, layers=2), tiny_sample(batch=3, tokens=17, width=256)
    before = set(live_bytes()) - {x.data_ptr() for x in model.parameters()}
    prepared = prepare_pt2e(capture(model, sample), FP4DiTQuantizer().set_global(w4a6()))
    with torch.no_grad():
        prepared(**sample)
    converted = convert_pt2e(prepared, fold_quantize=False)
    lowered = lower(converted)
    del model, prepared, converted
    kept = [part for x in lowered.state_dict().values() for part in flatten("", x).values()]
    assert any(isinstance(x, MinifloatTensor) for x in lowered.state_dict().values())
    assert sum(live_bytes(before).values()) == sum(x.untyped_storage().nbytes() for x in kept)
    del lowered, kept
    assert not live_bytes(before)
