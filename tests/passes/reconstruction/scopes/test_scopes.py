"""Scopes: every weight is in a unit, units follow the graph, and windows overlap as asked."""

import copy

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from fp4dit_ao import ReconstructionConfig, reconstruct
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction.iteration import Iteration
from fp4dit_ao.passes.reconstruction.minibatches import Minibatches
from fp4dit_ao.passes.reconstruction.objectives import PredictionDifference
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS
from fp4dit_ao.passes.reconstruction.scopes import SCOPES, Plan
from fp4dit_ao.passes.reconstruction.shards import one_shard
from fp4dit_ao.passes.reconstruction.streams import build
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, rounding_by
from fp4dit_ao.passes.reconstruction.walk import walk
from tests.passes.reconstruction.test_reconstruct import codes, error, prepare

BLOCKS = [f"blocks.{i}" for i in range(4)]
LINEARS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "ff.up", "ff.down"]


@pytest.fixture(scope="module")
def four_blocks():
    return prepare(layers=4)


def plan(prepared: torch.fx.GraphModule, scope: str, **settings: int) -> Plan:
    return SCOPES[scope](prepared, ReconstructionConfig(scope=scope, **settings))


def run_steps(found: Plan, values: dict) -> dict:
    """All values, after the steps ran one by one."""
    for segment in found.steps:
        outputs = segment.graph(*(values[name] for name in segment.inputs))
        values = values | dict(zip(segment.outputs, outputs, strict=True))
    return values


@pytest.mark.parametrize("scope", SCOPES)
def test_the_steps_make_up_the_graph_and_the_units_hold_every_weight(four_blocks, scope) -> None:
    prepared, data, model = four_blocks
    found = plan(prepared, scope)
    placeholders = [node.name for node in prepared.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        values = run_steps(found, dict(zip(placeholders, (*data[0].values(), True), strict=True)))
        (result,) = next(node for node in prepared.graph.nodes if node.op == "output").args[0]
        assert torch.equal(values[result.name], model(**data[0])[0])
        for unit in found.units:
            outputs = unit.segment.graph(*(values[name] for name in unit.segment.inputs))
            for name, value in zip(unit.segment.outputs, outputs, strict=True):
                assert torch.equal(value, values[name])
    held = [observer for unit in found.units for _, observer in unit.segment.observers]
    assert set(held) == {observer for _, observer in weight_observers(prepared)}
    assert [unit.first for unit in found.units] == sorted(unit.first for unit in found.units)


def test_block_scope_has_a_unit_for_every_block(four_blocks) -> None:
    assert [unit.segment.name for unit in plan(four_blocks[0], "block").units] == BLOCKS


def test_layer_scope_has_a_unit_for_every_linear_in_the_order_of_the_graph(four_blocks) -> None:
    found = plan(four_blocks[0], "layer")
    assert [unit.segment.name for unit in found.units] == [f"{block}.{name}" for block in BLOCKS for name in LINEARS]
    for unit in found.units:
        ((_, observer),) = unit.segment.observers
        assert observer.name == unit.segment.name + ".weight"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["0 1", "1 2", "2 3"]),
        ({"window": 2, "overlap": 0}, ["0 1", "2 3"]),
        ({"window": 3, "overlap": 1}, ["0 1 2", "2 3"]),
        ({"window": 3, "overlap": 2}, ["0 1 2", "1 2 3"]),
        ({"window": 4, "overlap": 3}, ["0 1 2 3"]),
        ({"window": 9, "overlap": 0}, ["0 1 2 3"]),
        ({"window": 1, "overlap": 0}, ["0", "1", "2", "3"]),
    ],
    ids=str,
)
def test_windows_advance_by_what_they_do_not_share(four_blocks, settings, expected) -> None:
    units = plan(four_blocks[0], "window", **settings).units
    held = [sorted({observer.name.split(".")[1] for _, observer in unit.segment.observers}) for unit in units]
    assert [" ".join(blocks) for blocks in held] == expected
    for unit, blocks in zip(units, held, strict=True):
        ends = dict.fromkeys((f"blocks.{blocks[0]}", f"blocks.{blocks[-1]}"))
        assert unit.segment.name == " … ".join(ends)


def test_a_window_of_one_block_is_block_scope() -> None:
    first, data, _ = prepare(layers=2)
    second = copy.deepcopy(first)
    common = {"iters": 60, "batch_size": 8, "relative_lr": 0.2}
    one = reconstruct(first, data, ReconstructionConfig(scope="block", **common), progress=False)
    other = reconstruct(
        second, data, ReconstructionConfig(scope="window", window=1, overlap=0, **common), progress=False
    )
    assert [row.kept for row in one.rows] == ["learned", "learned"]
    assert all(torch.equal(a, b) for a, b in zip(codes(first), codes(second), strict=True))
    assert one.stream_bytes == other.stream_bytes
    assert [(r.block, r.loss_before, r.loss_after) for r in one.rows] == [
        (r.block, r.loss_before, r.loss_after) for r in other.rows
    ]


@pytest.mark.parametrize("scope", ["layer", "window"])
@pytest.mark.parametrize("rounding", ["scale_aware", "adaround"])
def test_learned_rounding_beats_nearest_in_every_scope(scope, rounding) -> None:
    prepared, data, model = prepare(layers=3)
    nearest = error(convert_pt2e(copy.deepcopy(prepared)), model, data)
    config = ReconstructionConfig(rounding, scope=scope, iters=60, batch_size=8, relative_lr=0.2)
    report = reconstruct(prepared, data, config, progress=False)
    assert all(row.loss_after <= row.loss_before for row in report.rows)
    assert error(convert_pt2e(prepared), model, data) < 0.8 * nearest


def test_a_second_window_starts_from_what_the_first_settled() -> None:
    """With the same quantized inputs, the shared block's rounding is that of the first window, not nearest."""
    prepared, data, _ = prepare(layers=3)
    config = ReconstructionConfig(scope="window", iters=60, batch_size=8, relative_lr=0.2)
    rows = reconstruct(copy.deepcopy(prepared), data, config, progress=False).rows
    assert [row.block for row in rows] == ["blocks.0 … blocks.1", "blocks.1 … blocks.2"]
    assert [row.layers for row in rows] == [12, 12]
    assert [row.kept for row in rows] == ["learned", "learned"]

    # the same first window, and then a second one that learns nothing
    from fp4dit_ao.passes.reconstruction import engine, unit_rounding

    settled, original = [], unit_rounding.round_unit

    def first_only(found, rule, given, index, bar):
        settled.append([o.codes for o in found.weights])
        return original(found, rule, given if index == 0 else ReconstructionConfig(scope="window", iters=0), index, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "round_unit", first_only)
        (_, last) = reconstruct(prepared, data, config, progress=False).rows
    assert last.kept == "earlier"
    assert last.loss_before == last.loss_after == rows[1].loss_before
    assert [c is None for c in settled[1]] == [False] * 6 + [True] * 6
    assert all(torch.equal(a, b) for a, b in zip(settled[1][:6], codes(prepared)[6:12], strict=True))


def test_values_that_nothing_quantized_reaches_are_held_once_while_a_window_runs_ahead() -> None:
    """Full-precision values of a window's end, and quantized ones of its begin: as much as for a block."""
    prepared, data, _ = prepare(layers=3)
    config = ReconstructionConfig(iters=0)
    block = reconstruct(copy.deepcopy(prepared), data, config, progress=False)
    window = reconstruct(prepared, data, ReconstructionConfig(scope="window", iters=0), progress=False)
    assert window.stream_bytes == block.stream_bytes


@torch.no_grad()
def test_the_model_is_one_unit_judged_by_its_output(four_blocks) -> None:
    prepared, data, model = four_blocks
    (unit,) = plan(prepared, "model").units
    assert unit.segment.name == "(model)"
    nearest = ReconstructionConfig("nearest", scope="model")
    (row,) = reconstruct(copy.deepcopy(prepared), data, nearest, progress=False).rows
    power = sum(model(**sample)[0].square().mean() for sample in data)
    wanted = error(convert_pt2e(copy.deepcopy(prepared)), model, data) / float(power)
    assert row.loss_before == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_blocks_that_are_computed_again_have_the_same_gradients(four_blocks, drop) -> None:
    """With elements dropped, too: the second run draws what the first did."""
    prepared, data, _ = four_blocks
    prepared = copy.deepcopy(prepared)
    unit = plan(prepared, "model").units[0]
    prepared.requires_grad_(False)
    streams = build(prepared, data)
    for step in walk(plan(prepared, "model"), streams, 8, keep_inputs=True):
        assert step.segment.name == unit.segment.name
        break
    set_fake_quantize(prepared, True, True)
    gradients = []
    for recompute in (False, True):
        error = UnitError(unit.segment, one_shard(streams, 8), PredictionDifference(drop=drop), None, recompute)
        rules = {observer: ROUNDINGS["adaround"](w, error.grids[observer]) for observer, w in error.weights.items()}
        config = ReconstructionConfig("adaround", iters=1, batch_size=8)
        iteration = Iteration(error, rules, config, Minibatches(error, 8, 1, torch.Generator().manual_seed(0)), 1.0)
        iteration.prepare(0, None, 1.0)
        with rounding_by(iteration.soft.leaves), torch.enable_grad():
            iteration.run(False)
        gradients.append([p.grad for rule in rules.values() for p in rule.parameters()])
    assert len(gradients[0]) == 24
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*gradients, strict=True))


def test_discquant_rounds_the_whole_model() -> None:
    prepared, data, model = prepare(layers=2)
    nearest = error(convert_pt2e(copy.deepcopy(prepared)), model, data)
    config = ReconstructionConfig("discquant", scope="model", iters=40, batch_size=8)
    (row,) = reconstruct(prepared, data, config, progress=False).rows
    assert row.kept == "learned" and row.layers == 12
    assert error(convert_pt2e(prepared), model, data) < 0.8 * nearest
