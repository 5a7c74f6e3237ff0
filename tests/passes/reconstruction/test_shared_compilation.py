"""Blocks of one structure share what is compiled, and each computes with its own weights."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import (
    AdaRoundConfig,
    FP4DiTQuantizer,
    QuantConfig,
    ReconstructionConfig,
    capture,
    reconstruct,
    w4a6,
    w4a8,
)
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import shared_compilation
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS, LearnedRounding
from fp4dit_ao.passes.reconstruction.soft_weights import SoftWeights, _results_of
from tests.graphs import TinyDiT, tiny_sample
from tests.passes.reconstruction.rounding.test_sign_gradient import OBSERVERS, random

SHORT = AdaRoundConfig(iters=20, batch_size=3, relative_lr=0.5, compile=True)
Quantizer = Callable[[], FP4DiTQuantizer]


def plain() -> FP4DiTQuantizer:
    return FP4DiTQuantizer().set_global(w4a6())


def two_formats() -> FP4DiTQuantizer:
    return plain().set_module_name("blocks.1.*", w4a8())


def two_structures() -> FP4DiTQuantizer:
    return plain().set_module_name("blocks.1.attn*", None)


def static_ranges() -> FP4DiTQuantizer:
    return FP4DiTQuantizer().set_global(QuantConfig(weight="e2m1", activation="e2m3", activation_granularity="tensor"))


SOFT_WEIGHTS = {plain: 1, two_formats: 1, two_structures: 2, static_ranges: 1}
"""Graphs of soft weights: formats make no difference in AdaRound's, and ranges of inputs none at all."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GraphModule]]:
    """Graphs that were given to the compiler, which gives them back as they are."""
    found: list[GraphModule] = []

    def note(graph: GraphModule, **options: object) -> GraphModule:
        found.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", note)
    shared_compilation.forget()
    yield found
    shared_compilation.forget()


def prepared_graph(
    quantizer: Quantizer, sizes: tuple[int, ...] = (6, 6, 6, 6)
) -> tuple[GraphModule, list[dict[str, Tensor]]]:
    data = [tiny_sample(tokens=tokens, seed=seed) for seed, tokens in enumerate(sizes)]
    prepared = prepare_pt2e(capture(TinyDiT(layers=3), data[0]), quantizer())
    with torch.no_grad():
        for sample in data:
            prepared(**sample)
    return prepared, data


def of_units(graphs: list[GraphModule]) -> list[GraphModule]:
    return [graph for graph in graphs if not _makes_soft_weights(graph)]


def of_soft_weights(graphs: list[GraphModule]) -> list[GraphModule]:
    return [graph for graph in graphs if _makes_soft_weights(graph)]


def _makes_soft_weights(graph: GraphModule) -> bool:
    return any(node.target is _results_of for node in graph.graph.nodes)


def codes(prepared: GraphModule) -> list[Tensor]:
    return [observer.codes for _, observer in weight_observers(prepared) if observer.codes is not None]


@pytest.mark.parametrize(
    ("quantizer", "config", "graphs"),
    [
        (plain, SHORT, 1),
        (plain, replace(SHORT, bfloat16=True), 1),
        (two_formats, SHORT, 2),
        (two_structures, SHORT, 2),
        (static_ranges, SHORT, 3),
    ],
    ids=["one structure", "bfloat16", "two formats", "two structures", "tensors of its own"],
)
def test_each_structure_is_compiled_once(
    quantizer: Quantizer, config: ReconstructionConfig, graphs: int, compiled: list[GraphModule]
) -> None:
    prepared, data = prepared_graph(quantizer)
    expected = copy.deepcopy(prepared)
    shared = reconstruct(prepared, data, config, progress=False)
    assert len(of_units(compiled)) == graphs
    assert len(of_soft_weights(compiled)) == SOFT_WEIGHTS[quantizer]
    own = reconstruct(expected, data, replace(config, compile=False), progress=False)
    assert [row.loss_after for row in shared.rows] == [row.loss_after for row in own.rows]
    assert any(row.kept == "learned" for row in own.rows)
    assert all(torch.equal(x, y) for x, y in zip(codes(prepared), codes(expected), strict=True))


def test_what_is_drawn_by_chance_is_compiled_for_each_block(compiled: list[GraphModule]) -> None:
    """A shared graph has observers of its own, which are not told to drop anything."""
    config = ReconstructionConfig(objective="prediction_difference", iters=2, batch_size=3, compile=True)
    prepared, data = prepared_graph(plain)
    reconstruct(prepared, data, config, progress=False)
    assert len(of_units(compiled)) == 3


def test_rows_of_several_sizes_are_compiled_for_each_block(compiled: list[GraphModule]) -> None:
    """How many rows of each size a step draws changes, and the compiler decides by what it has seen before."""
    prepared, data = prepared_graph(plain, sizes=(6, 6, 9, 9))
    reconstruct(prepared, data, SHORT, progress=False)
    assert len(of_units(compiled)) == 3


def test_a_shared_graph_keeps_no_unit_alive(compiled: list[GraphModule]) -> None:
    prepared, data = prepared_graph(plain)
    reconstruct(prepared, data, SHORT, progress=False)
    assert len(compiled) == 2
    assert not [x for graph in compiled for x in (*graph.parameters(), *graph.buffers())]


LEARNED = {name: rule for name, rule in ROUNDINGS.items() if isinstance(rule, type)}


def make_soft(name: str, kind: str, seed: int, compiled: bool) -> tuple[LearnedRounding, list[Tensor]]:
    """A rule, and of a step with it the soft weight, the penalty, and all gradients."""
    observer, weight = OBSERVERS[kind](), random(seed=seed)
    rule = LEARNED[name](weight, observer.grid(weight))
    soft = SoftWeights({observer: rule}, {observer: weight}, {observer: torch.float32}, compiled)
    soft.beta.fill_(3.0)
    soft.soften(True)
    leaf, penalty = soft.leaves[observer].weight, soft.penalty.detach()
    leaf.grad = torch.sin(torch.arange(leaf.numel(), dtype=torch.float32)).reshape(leaf.shape)
    soft.backward(torch.tensor(0.5))
    gradients = [parameter.grad for parameter in rule.parameters()]
    return rule, [leaf.detach(), penalty, *(x for x in gradients if x is not None)]


def rules_with_formats() -> Iterator[tuple[str, str]]:
    """Each rule with two formats and each format with two rules: tracing one takes seconds."""
    rules, formats = list(LEARNED), list(OBSERVERS)
    for index in range(max(len(rules), len(formats))):
        for shift in (0, 3):
            yield rules[index % len(rules)], formats[(index + shift) % len(formats)]


@pytest.mark.parametrize(("name", "kind"), rules_with_formats())
def test_every_rounding_is_one_graph_that_is_compiled_once(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Dynamo: what another unit's rule has in its tensors is read, and nothing of the first one's is left in the code."""
    torch._dynamo.reset()
    shared_compilation.forget()
    traced = 0

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal traced
        traced += 1
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda graph, **options: real(graph, backend=backend, fullgraph=True, **options)
    )
    alive = []
    for seed in range(3):
        rule, found = make_soft(name, kind, seed, compiled=True)
        alive.append(weakref.ref(next(rule.parameters())))
        del rule
        _, expected = make_soft(name, kind, seed, compiled=False)
        # compiled code adds the penalty up in another order
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert traced == 1
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    shared_compilation.forget()
    torch._dynamo.reset()
