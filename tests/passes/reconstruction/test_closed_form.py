"""Closed-form rounding within units: Hessians are those of quantized inputs, in topological order, and the better is kept."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from fp4dit_ao import ReconstructionConfig, reconstruct, w4a6
from fp4dit_ao.config import int_w4a6, mxfp4, nvfp4
from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.partition import partition
from fp4dit_ao.passes.reconstruction.closed_form_rounding import groups_by_input
from fp4dit_ao.passes.reconstruction.rounding import GPTQ, ROUNDINGS, ClosedFormRounding
from tests.passes.reconstruction.test_reconstruct import codes, error, prepare

GPTQ_BLOCK = ReconstructionConfig("gptq", batch_size=8)


@pytest.fixture
def registered(monkeypatch):
    """Registers a rule for one test."""

    def register(rule: ClosedFormRounding) -> ReconstructionConfig:
        monkeypatch.setitem(ROUNDINGS._methods, "mine", rule)
        return ReconstructionConfig("mine", batch_size=8)

    return register


@pytest.mark.parametrize(
    ("recipe", "factor"), [(w4a6(), 0.7), (int_w4a6(), 0.7), (nvfp4(), 0.7), (mxfp4(), 0.9)],
    ids=["float", "int", "nvfp4", "mxfp4"],
)  # fmt: skip
def test_gptq_beats_nearest(recipe, factor) -> None:
    """By less where activations of 4 bits leave an error of their own."""
    prepared, data, model = prepare(recipe, layers=2)
    nearest = error(convert_pt2e(copy.deepcopy(prepared)), model, data)
    report = reconstruct(prepared, data, GPTQ_BLOCK, progress=False)
    assert [row.block for row in report.rows] == ["blocks.0", "blocks.1"]
    for row in report.rows:
        assert row.kept == "solved"
        assert row.layers == 6
        assert row.loss_after < factor * row.loss_before
        assert 0 < row.changed < 0.5
    assert error(convert_pt2e(prepared), model, data) < factor * nearest


def test_linears_that_share_an_input_share_a_hessian_in_topological_order() -> None:
    prepared, _, _ = prepare(layers=2)
    (block,) = [segment for segment in partition(prepared) if segment.name == "blocks.1"]
    names = [
        [o.name.removeprefix("blocks.1.").removesuffix(".weight") for o in g.observers] for g in groups_by_input(block)
    ]
    assert names == [["attn.to_q", "attn.to_k", "attn.to_v"], ["attn.to_out"], ["ff.up"], ["ff.down"]]


@dataclass(frozen=True)
class Recorder(ClosedFormRounding):
    """Rounds as GPTQ does, and keeps the Hessians."""

    seen: dict[str, Tensor]

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None, name: str) -> Tensor:
        assert hessian is not None
        self.seen[name] = hessian.clone()
        return GPTQ().solve(weight, grid, hessian, name)


def test_hessians_are_of_quantized_inputs_behind_weights_that_are_rounded_already(registered) -> None:
    """Against the converted graph: its linears' inputs are quantized activations, behind the final weights."""
    prepared, data, _ = prepare(layers=2)
    rule = Recorder({})
    reconstruct(prepared, data, registered(rule), progress=False)
    converted = convert_pt2e(prepared)
    expected: dict[str, Tensor] = {}

    class Catch(torch.fx.Interpreter):
        def run_node(self, n):
            if n.target is torch.ops.aten.linear.default:
                x, _ = self.fetch_args_kwargs_from_env(n)
                stack = [name for name, _ in n.meta["nn_module_stack"].values()]
                tokens = x[0].flatten(0, -2).double()
                expected[f"{stack[-1]}.weight"] = 2 * tokens.T @ tokens
            return super().run_node(n)

    with torch.no_grad():
        Catch(converted).run(*(torch.cat([s[k] for s in data]) for k in data[0]), True)
    assert len(rule.seen) == 12
    for name, hessian in rule.seen.items():
        assert hessian.dtype == torch.float64
        assert torch.allclose(
            hessian, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].diagonal().mean())
        ), name


def test_block_and_layer_scope_solve_the_same_problems() -> None:
    block, data, _ = prepare(layers=2)
    layer, window = copy.deepcopy(block), copy.deepcopy(block)
    reconstruct(block, data, GPTQ_BLOCK, progress=False)
    reconstruct(layer, data, ReconstructionConfig("gptq", scope="layer", batch_size=8), progress=False)
    reconstruct(window, data, ReconstructionConfig("gptq", scope="window", batch_size=8), progress=False)
    for a, b, c in zip(codes(block), codes(layer), codes(window), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@dataclass(frozen=True)
class Worst(ClosedFormRounding):
    """The lowest level everywhere."""

    needs_hessian = False

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None, name: str) -> Tensor:
        assert hessian is None
        return grid.encode(torch.full_like(weight, -1e9))


@pytest.mark.parametrize("scope", ["block", "layer", "window"])
def test_nearest_is_kept_where_a_solution_is_worse(registered, scope) -> None:
    prepared, data, _ = prepare(layers=2)
    config = registered(Worst())
    report = reconstruct(
        prepared, data, ReconstructionConfig(config.rounding, scope=scope, batch_size=8), progress=False
    )
    assert {row.kept for row in report.rows} == {"nearest"}
    assert all(row.loss_after == row.loss_before and row.changed == 0 for row in report.rows)
    assert codes(prepared) == [None] * 12


def test_nearest_through_reconstruction_is_nearest() -> None:
    prepared, data, _ = prepare()
    report = reconstruct(prepared, data, ReconstructionConfig("nearest"), progress=False)
    assert [row.kept for row in report.rows] == ["nearest"]
    assert codes(prepared) == [None] * 6


def test_samples_of_other_sizes_count_alike() -> None:
    """Hessians are sums over tokens, so that neither stacking nor the batch size matters but in the last bits."""
    prepared, data, _ = prepare()
    apart = copy.deepcopy(prepared)
    first = reconstruct(prepared, data, ReconstructionConfig("gptq", batch_size=8), progress=False)
    second = reconstruct(apart, data, ReconstructionConfig("gptq", batch_size=3), progress=False)
    assert first.rows[0].loss_after == pytest.approx(second.rows[0].loss_after, rel=0.02)
    differ = [float((a != b).float().mean()) for a, b in zip(codes(prepared), codes(apart), strict=True)]
    assert max(differ) < 0.01


def test_the_progress_bar_counts_linears(monkeypatch) -> None:
    from fp4dit_ao.passes.reconstruction import engine

    bars = []

    class Bar(engine.tqdm):  # type: ignore[name-defined,misc]
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})
            bars.append(self)

    monkeypatch.setattr(engine, "tqdm", Bar)
    prepared, data, _ = prepare(layers=2)
    reconstruct(prepared, data, GPTQ_BLOCK)
    assert (bars[0].total, bars[0].n) == (12, 12)
