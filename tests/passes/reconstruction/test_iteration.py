"""A step of learning: its gradients are those of the whole loss, it never waits for the device, products can be bfloat16."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import AdaRoundConfig, FP4DiTQuantizer, ReconstructionConfig, capture, reconstruct, w4a6
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import learned_rounding
from fp4dit_ao.passes.reconstruction.bfloat16_products import with_bfloat16_products
from fp4dit_ao.passes.reconstruction.cuda_graph import WARM_UP, can_capture
from fp4dit_ao.passes.reconstruction.iteration import Iteration, products_in_bfloat16
from fp4dit_ao.passes.reconstruction.minibatches import Minibatches
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS
from fp4dit_ao.passes.reconstruction.scopes import SCOPES
from fp4dit_ao.passes.reconstruction.shards import one_shard
from fp4dit_ao.passes.reconstruction.streams import build
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, rounding_by
from fp4dit_ao.passes.reconstruction.walk import walk
from tests.graphs import TinyDiT, tiny_sample

SHORT = AdaRoundConfig(iters=60, batch_size=8, relative_lr=0.2)
_ATEN = torch.ops.aten


def prepared_graph(layers: int = 1, device: str = "cpu") -> tuple[torch.fx.GraphModule, list[dict[str, Tensor]]]:
    model = TinyDiT(layers=layers).to(device)
    data = [{k: v.to(device) for k, v in tiny_sample(seed=seed).items()} for seed in range(4)]
    return prepare_pt2e(capture(model, data[0]), FP4DiTQuantizer().set_global(w4a6())), data


def unit(config: ReconstructionConfig, device: str = "cpu", sizes: tuple[int, ...] = ()) -> UnitError:
    """The error of the one block, with its data before and behind it."""
    prepared, data = prepared_graph(device=device)
    data += [tiny_sample(batch=2, tokens=tokens) for tokens in sizes]
    for node, observer in weight_observers(prepared):
        observer.quantized(prepared.get_parameter(str(node.args[0].target)))
    prepared.requires_grad_(False)
    streams = build(prepared, data)
    for stream in streams:
        stream.move_to(torch.device(device))
    plan = SCOPES.find("block")(prepared, config)
    block = next(walk(plan, streams, 8))
    set_fake_quantize(prepared, True, True)
    return UnitError(block.segment, one_shard(streams, 8), OBJECTIVES.find("mse"))


def iteration_of(error: UnitError, config: ReconstructionConfig) -> tuple[Iteration, dict]:
    rule = ROUNDINGS.find(config.rounding)
    rules = {observer: rule(weight, error.grids[observer]) for observer, weight in error.weights.items()}
    minibatches = Minibatches(error, config.batch_size, config.iters, torch.Generator().manual_seed(0))
    return Iteration(error, rules, config, minibatches, 0.5), rules


class Watch(TorchDispatchMode):
    """Notes whether a tensor was read as a number, and the types of what products take."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = False
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads |= (
            func.overloadpacket is _ATEN._local_scalar_dense and args[0].is_floating_point()
        )  # not a format's levels
        if func.overloadpacket in (_ATEN.mm, _ATEN.addmm) or "scaled_dot_product" in str(func):
            self.types |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rounding", ["scale_aware", "adaround", "cbq", "sign_gradient", "flexround"])
@pytest.mark.parametrize("penalised", [True, False])
def test_gradients_are_those_of_the_whole_loss(rounding: str, penalised: bool) -> None:
    """In one piece of autograd: the error over 0.5, and the regularizer's weight times the mean penalty of all weights."""
    config = ReconstructionConfig(rounding, iters=4, batch_size=8, regularizer=0.7)
    error = unit(config)
    iteration, rules = iteration_of(error, config)
    optimizer = torch.optim.SGD([p for rule in rules.values() for p in rule.parameters()], lr=0.0)
    iteration.optimizer = optimizer
    iteration.prepare(0, 3.0 if penalised else None, 1.0)
    with rounding_by(iteration.soft.leaves), torch.enable_grad():
        iteration.run(penalised)
    found = [p.grad for rule in rules.values() for p in rule.parameters()]

    optimizer.zero_grad()
    with rounding_by(rules), torch.enable_grad():
        loss = error.of(error.gather(0, torch.arange(8)), error.graph) / 0.5
        count = sum(weight.numel() for weight in error.weights.values())
        for observer, rule in rules.items():
            penalty = rule.regularizer(3.0)
            loss = loss + (0.7 * error.weights[observer].numel() / count * penalty if penalised else 0)
        loss.backward()
    assert iteration.losses()[0] == pytest.approx(float(loss), rel=1e-5)
    for got, parameter in zip(found, (p for rule in rules.values() for p in rule.parameters()), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rounding", ["scale_aware", "flexround"])
def test_a_step_never_waits_for_the_device(rounding: str) -> None:
    """No tensor is read as a number, which a GPU would have to finish for."""
    config = ReconstructionConfig(rounding, iters=4, batch_size=3)
    error = unit(config)
    iteration, _ = iteration_of(error, config)
    with Watch() as watch, rounding_by(iteration.soft.leaves), torch.enable_grad():
        for step in range(3):
            iteration.prepare(step, 3.0, 1.0)
            iteration.run()
        assert not watch.reads
        iteration.losses()
    assert watch.reads


def test_what_is_multiplied_is_bfloat16_and_what_is_put_out_is_not() -> None:
    error = unit(SHORT)
    low = with_bfloat16_products(error.graph)
    inputs = error.gather(0, torch.arange(8)).inputs
    set_fake_quantize(error.graph, False, False, paused=True)
    with torch.no_grad(), Watch() as plain:
        wanted = error.graph(*inputs)
    with torch.no_grad(), Watch() as watch:
        found = low(*inputs)
    assert plain.types == {torch.float32}
    assert watch.types == {torch.bfloat16}
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        assert 0 < float((got - want).norm() / want.norm()) < 2**-7  # five products, each rounded to 8 digits


def test_a_unit_is_gone_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables are 88 bytes a weight, which the next unit would wait for."""
    rules: list[weakref.ref[torch.nn.Module]] = []

    class Noting(Iteration):
        def __init__(self, error: UnitError, found: Any, *arguments: Any):
            assert not [ref for ref in rules if ref() is not None]
            rules.extend(map(weakref.ref, found.values()))
            super().__init__(error, found, *arguments)

    monkeypatch.setattr(learned_rounding, "Iteration", Noting)
    prepared, data = prepared_graph(layers=2)
    gc.collect()
    gc.disable()
    try:
        reconstruct(prepared, data, replace(SHORT, iters=2), progress=False)
        assert len(rules) == 12
        assert not [ref for ref in rules if ref() is not None]
    finally:
        gc.enable()


def test_bfloat16_products_learn_as_well() -> None:
    prepared, data = prepared_graph()
    exact, low = copy.deepcopy(prepared), copy.deepcopy(prepared)
    row = reconstruct(exact, data, replace(SHORT, bfloat16=False), progress=False).rows[0]
    other = reconstruct(low, data, replace(SHORT, bfloat16=True), progress=False).rows[0]
    assert other.loss_before == row.loss_before
    assert other.loss_after == pytest.approx(row.loss_after, rel=0.1)
    assert other.loss_after != row.loss_after


def test_bfloat16_is_for_gpus_unless_asked_for() -> None:
    cpu = torch.device("cpu")
    assert not products_in_bfloat16(SHORT, cpu)
    assert products_in_bfloat16(replace(SHORT, bfloat16=True), cpu)
    assert not products_in_bfloat16(replace(SHORT, bfloat16=False), torch.device("cuda"))


@pytest.mark.parametrize("has_it", [False, True])
def test_a_cpu_without_bfloat16_is_said(has_it: bool, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setattr("fp4dit_ao.passes.reconstruction.iteration.cpu_multiplies_bfloat16", lambda: has_it)
    products_in_bfloat16(SHORT, torch.device("cpu"))
    assert not recwarn
    products_in_bfloat16(replace(SHORT, bfloat16=True), torch.device("cpu"))
    assert ["no products in bfloat16" in str(found.message) for found in recwarn] == [True] * (not has_it)


def test_minibatches_are_the_seeds() -> None:
    """Sorted, without replacement; of a stream that holds all rows, or divided among streams."""
    error, divided = unit(SHORT), unit(SHORT, sizes=(9,))
    assert [stream.rows for stream in divided.streams] == [8, 2]
    for found in (error, divided):
        generator, expected = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        minibatches = Minibatches(found, 4, 6, generator)
        assert minibatches.fixed == (found is error)
        for step in range(6):
            minibatches.load(step)
            batches = minibatches.batches(found.shards.own[0])
            first = [0, 8]
            drawn = torch.cat([batch.rows + first[batch.number] for batch, _ in batches])
            rows = found.shards.total_rows
            assert drawn.tolist() == sorted(torch.randperm(rows, generator=expected)[:4].tolist())
            for batch, weight in batches:
                assert weight == batch.size / 4
                name = found.segment.inputs[0]
                whole = found.streams[batch.number].quantized[name]
                assert torch.equal(batch.inputs[0], whole[batch.rows])


def test_only_steps_that_repeat_are_captured() -> None:
    config = replace(SHORT, iters=2)
    error = unit(config)
    iteration, _ = iteration_of(error, config)
    minibatches = Minibatches(error, 4, 2, torch.Generator())
    assert not can_capture(minibatches, OBJECTIVES.find("mse"), iteration.optimizer)  # on a CPU


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.filterwarnings("error:steps are launched")
def test_a_captured_step_learns_what_an_eager_one_does_on_cuda(
    offload: bool, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, data = prepared_graph(layers=2, device="cuda")
    config = replace(SHORT, offload=offload, bfloat16=bfloat16, batch_size=5)
    captured, eager = copy.deepcopy(prepared), copy.deepcopy(prepared)
    rows = reconstruct(captured, data, config, progress=False).rows
    monkeypatch.setattr(learned_rounding, "can_capture", lambda *_: False)
    others = reconstruct(eager, data, config, progress=False).rows
    for row, other in zip(rows, others, strict=True):
        assert row.kept == other.kept == "learned"
        assert row.loss_before == pytest.approx(other.loss_before, rel=0.05)
        assert row.loss_after == pytest.approx(other.loss_after, rel=0.1)


@needs_gpu
def test_replays_take_steps_on_cuda() -> None:
    """Parameters after a replay are those after an eager step from the same state, but for the order of sums."""
    config = replace(SHORT, iters=WARM_UP + 3, batch_size=8)
    ends = []
    for graph in (True, False):
        error = unit(config, "cuda")
        iteration, rules = iteration_of(error, config)
        step = learned_rounding.Captured(iteration.run, torch.device("cuda")) if graph else iteration.run
        with rounding_by(iteration.soft.leaves), torch.enable_grad():
            for number in range(config.iters):
                iteration.prepare(number, 3.0, 1 - number / 20)
                step()
        assert not graph or step.graph is not None
        ends.append([p.detach() for rule in rules.values() for p in rule.parameters()])
        assert math.isfinite(iteration.losses()[0])
    for mine, other in zip(*ends, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


@needs_gpu
@pytest.mark.filterwarnings("ignore:steps are launched")
def test_what_cannot_be_captured_goes_on_eagerly_on_cuda() -> None:
    counted = torch.zeros((), device="cuda")

    def step() -> None:
        counted.add_(1)
        float(counted)

    captured = learned_rounding.Captured(step, torch.device("cuda"))
    for _ in range(WARM_UP + 3):
        captured()
    assert captured.graph is None
    assert float(counted) == WARM_UP + 3
