"""Reconstruction: it helps, repeats, resumes with the same bits, and refuses what it cannot use."""

import copy
from dataclasses import replace

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import (
    AdaRoundConfig,
    FP4DiTQuantizer,
    QuantConfig,
    ReconstructionConfig,
    capture,
    reconstruct,
    w4a6,
    w4a6_auto,
)  # fmt: skip
from fp4dit_ao.config import int_w4a6
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import engine, unit_rounding
from fp4dit_ao.passes.reconstruction.streams import build
from fp4dit_ao.util.tensor_state import load_state, save_state
from tests.graphs import TinyDiT, tiny_sample

SHORT = AdaRoundConfig(iters=60, batch_size=8, relative_lr=0.2)


def samples(count: int = 4, **kwargs) -> list[dict]:
    return [tiny_sample(seed=seed, **kwargs) for seed in range(count)]


def prepare(config: QuantConfig = w4a6(), layers: int = 1, dtype: torch.dtype = torch.float32):
    model = TinyDiT(layers=layers).to(dtype)
    data = [{k: v.to(dtype) for k, v in sample.items()} for sample in samples()]
    prepared = prepare_pt2e(capture(model, data[0]), FP4DiTQuantizer().set_global(config))
    with torch.no_grad():
        for sample in data:
            prepared(**sample)
    return prepared, data, model


def codes(prepared: torch.fx.GraphModule) -> list[torch.Tensor | None]:
    return [observer.codes for _, observer in weight_observers(prepared)]


def error(graph: torch.fx.GraphModule, model: torch.nn.Module, data: list[dict]) -> float:
    with torch.no_grad():
        return float(sum((graph(**s)[0] - model(**s)[0]).square().mean() for s in data))


@pytest.mark.parametrize("scale_aware", [True, False])
@pytest.mark.parametrize("recipe", [w4a6(), int_w4a6()], ids=["float", "int"])
def test_learned_rounding_beats_nearest(recipe, scale_aware) -> None:
    prepared, data, model = prepare(recipe)
    nearest = error(convert_pt2e(copy.deepcopy(prepared)), model, data)
    report = reconstruct(prepared, data, replace(SHORT, scale_aware=scale_aware), progress=False)
    (row,) = report.rows
    assert row.kept == "learned"
    assert row.loss_after < 0.8 * row.loss_before
    assert 0 < row.changed < 0.5
    assert error(convert_pt2e(prepared), model, data) < 0.9 * nearest


def test_the_reported_loss_is_that_of_the_converted_block() -> None:
    """One block between unquantized ends: the loss is the error of the value before the final projection."""
    prepared, data, model = prepare()
    row = reconstruct(prepared, data, SHORT, progress=False).rows[0]
    converted = convert_pt2e(prepared)

    def hidden(graph: torch.nn.Module, sample: dict) -> torch.Tensor:
        graph.proj_out = torch.nn.Identity()
        return graph(**sample)[0]

    captured = {}
    node = next(n for n in converted.graph.nodes if n.op == "output").args[0][0].args[0]

    class Catch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n is node:
                captured["x"] = result
            return result

    losses = []
    with torch.no_grad():
        stacked = {k: torch.cat([s[k] for s in data]) for k in data[0]}
        Catch(converted).run(*stacked.values(), False)
        target = hidden(copy.deepcopy(model), stacked)
        losses.append((captured["x"] - target).square().mean() / target.square().mean())
    assert float(losses[0]) == pytest.approx(row.loss_after, rel=1e-4)


def test_no_iterations_is_nearest() -> None:
    prepared, data, _ = prepare()
    report = reconstruct(prepared, data, AdaRoundConfig(iters=0), progress=False)
    assert [row.kept for row in report.rows] == ["nearest"]
    assert codes(prepared) == [None] * 6


def test_the_same_seed_gives_the_same_bits() -> None:
    first, data, _ = prepare(layers=2)
    second = copy.deepcopy(first)
    other = copy.deepcopy(first)
    config = replace(SHORT, batch_size=3)
    reconstruct(first, data, config, progress=False)
    torch.manual_seed(99)
    reconstruct(second, data, config, progress=False)
    reconstruct(other, data, replace(config, seed=1), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(codes(first), codes(second), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(codes(first), codes(other), strict=True))


@pytest.mark.parametrize(
    ("config", "units"),
    [
        (SHORT, ["blocks.0", "blocks.1", "blocks.2"]),
        (ReconstructionConfig("gptq", batch_size=8), ["blocks.0", "blocks.1", "blocks.2"]),
        (
            ReconstructionConfig("gptq", scope="window", batch_size=8),
            ["blocks.0 … blocks.1", "blocks.1 … blocks.2"],
        ),
        (
            ReconstructionConfig("sign_gradient", scope="window", iters=10, batch_size=8),
            ["blocks.0 … blocks.1", "blocks.1 … blocks.2"],
        ),
    ],
    ids=["learned", "closed form", "window", "scales, too"],
)
def test_a_killed_run_resumes_with_the_same_bits(config, units, tmp_path, monkeypatch) -> None:
    whole, data, _ = prepare(layers=3)
    killed, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
    reconstruct(whole, data, config, progress=False)

    blocks: list[str] = []

    def dies_in_the_second_unit(error, *args):
        blocks.append(error.segment.name)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return unit_rounding.round_unit(error, *args)

    monkeypatch.setattr(engine, "round_unit", dies_in_the_second_unit)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(killed, data, config, checkpoint_dir=tmp_path, progress=False)
    assert [f.name for f in tmp_path.iterdir()] == ["block-000.safetensors"]

    ran: list[str] = []
    monkeypatch.setattr(
        engine,
        "round_unit",
        lambda error, *args: (ran.append(error.segment.name), unit_rounding.round_unit(error, *args))[1],
    )
    report = reconstruct(resumed, data, config, checkpoint_dir=tmp_path, progress=False)
    assert ran == units[1:]
    assert [row.block for row in report.rows] == units
    assert all(torch.equal(a, b) for a, b in zip(codes(whole), codes(resumed), strict=True))
    scales = [[observer.scale for _, observer in weight_observers(graph)] for graph in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*scales, strict=True))


def test_a_checkpoint_of_another_run_is_refused(tmp_path) -> None:
    prepared, data, _ = prepare()
    reconstruct(copy.deepcopy(prepared), data, SHORT, checkpoint_dir=tmp_path, progress=False)
    others = [
        replace(SHORT, seed=1),
        ReconstructionConfig("gptq"),
        ReconstructionConfig(scope="layer"),
        ReconstructionConfig("adaround", iters=60, batch_size=8, relative_lr=0.2),
    ]
    for other in others:
        with pytest.raises(ValueError, match="belongs to another run"):
            reconstruct(copy.deepcopy(prepared), data, other, checkpoint_dir=tmp_path, progress=False)


def test_altered_codes_and_reports_are_refused(tmp_path) -> None:
    prepared, data, _ = prepare()
    reconstruct(copy.deepcopy(prepared), data, SHORT, checkpoint_dir=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"block-000.safetensors is broken .*SHA-256.*; delete it to reconstruct"):
        reconstruct(copy.deepcopy(prepared), data, SHORT, checkpoint_dir=tmp_path, progress=False)
    file.write_bytes(whole)
    tensors, texts = load_state(file, "")
    save_state(file, tensors, texts | {"row": "{"})
    with pytest.raises(ValueError, match=r"block-000.safetensors is broken .*report.*; delete it to reconstruct"):
        reconstruct(copy.deepcopy(prepared), data, SHORT, checkpoint_dir=tmp_path, progress=False)


def test_an_adaround_config_resumes_as_the_config_that_it_stands_for(tmp_path, monkeypatch) -> None:
    prepared, data, _ = prepare()
    same = ReconstructionConfig(iters=60, batch_size=8, relative_lr=0.2)
    again = copy.deepcopy(prepared)
    reconstruct(prepared, data, SHORT, checkpoint_dir=tmp_path, progress=False)
    monkeypatch.setattr(engine, "round_unit", None)  # nothing is left to do
    reconstruct(again, data, same, checkpoint_dir=tmp_path, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(codes(prepared), codes(again), strict=True))
    next(tmp_path.iterdir()).write_bytes(b"junk")
    with pytest.raises(ValueError, match="is broken"):
        reconstruct(prepared, data, SHORT, checkpoint_dir=tmp_path, progress=False)


def test_formats_are_chosen_first() -> None:
    prepared, data, _ = prepare(w4a6_auto())
    reconstruct(prepared, data, AdaRoundConfig(iters=0), progress=False)
    assert all(observer.resolved for _, observer in weight_observers(prepared))


def test_samples_of_different_sizes_and_batches() -> None:
    prepared, _, _ = prepare()
    data = [*samples(2), tiny_sample(batch=2, tokens=9), tiny_sample(batch=3, tokens=6)]
    assert sorted(stream.rows for stream in build(prepared, data)) == [2, 7]
    assert reconstruct(prepared, data, SHORT, progress=False).rows[0].kept == "learned"


def test_half_precision() -> None:
    prepared, data, _ = prepare(dtype=torch.bfloat16)
    row = reconstruct(prepared, data, SHORT, progress=False).rows[0]
    assert row.loss_after < row.loss_before


def test_the_graph_is_left_observing_and_trainable() -> None:
    prepared, data, model = prepare()
    wanted = {name: p.requires_grad for name, p in prepared.named_parameters()}
    reconstruct(prepared, data, SHORT, progress=False)
    assert {name: p.requires_grad for name, p in prepared.named_parameters()} == wanted
    with torch.no_grad():
        assert torch.equal(prepared(**data[0])[0], model(**data[0])[0])


def test_memory_is_bounded_and_stated() -> None:
    prepared, data, _ = prepare()
    report = reconstruct(prepared, data, AdaRoundConfig(iters=0), progress=False)
    # 8 rows x 6 tokens x 128 features: the block's input and its two outputs; and the modulation that both streams share
    assert report.stream_bytes == 4 * (3 * 8 * 6 * 128 + 8 * 128)
    with pytest.raises(ValueError, match=r"8 calibration rows, over the limit .* give about \d rows"):
        limit = report.stream_bytes * 3 // 8
        reconstruct(prepared, data, AdaRoundConfig(iters=0, memory_limit_bytes=limit), progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no calibration samples"),
        ([{"latents": torch.zeros(1)}], "sample 0 does not fit .* hidden_states, shift"),
        ([tiny_sample() | {"shift": torch.full((2, 1, 128), torch.nan)}], "sample 0: shift holds NaN"),
    ],
)
def test_bad_samples_are_refused(data, message) -> None:
    prepared, _, _ = prepare()
    with pytest.raises(ValueError, match=message):
        reconstruct(prepared, data, SHORT, progress=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"rounding": "up"},
            "unknown rounding 'up'; choose one of nearest, scale_aware, adaround, gptq, gptq_act_order",
        ),
        ({"objective": "beauty"}, "unknown objective 'beauty'; choose one of mse"),
        ({"scope": "world"}, "unknown scope 'world'; choose one of block, layer, window"),
    ],
)
def test_unknown_methods_are_refused_with_the_known(names, message) -> None:
    prepared, data, _ = prepare()
    with pytest.raises(ValueError, match=message):
        reconstruct(prepared, data, ReconstructionConfig(**names), progress=False)


def test_a_report_reads_as_a_table() -> None:
    prepared, data, _ = prepare()
    report = reconstruct(prepared, data, SHORT, progress=False)
    assert "| blocks.0 | 6 |" in str(report)
    assert report.to_dict()["rows"][0]["block"] == "blocks.0"


def test_reconstructing_again_starts_from_nearest() -> None:
    first, data, _ = prepare()
    again = copy.deepcopy(first)
    report = reconstruct(first, data, SHORT, progress=False)
    reconstruct(again, data, replace(SHORT, seed=7, iters=30), progress=False)
    repeated = reconstruct(again, data, SHORT, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(codes(first), codes(again), strict=True))
    assert repeated.rows[0].changed == report.rows[0].changed


def test_values_kept_in_host_memory_change_no_bit() -> None:
    first, data, _ = prepare(layers=2)
    offloaded = copy.deepcopy(first)
    reconstruct(first, data, SHORT, progress=False)
    reconstruct(offloaded, data, replace(SHORT, offload=True), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(codes(first), codes(offloaded), strict=True))


def test_a_compiled_block_learns_as_well() -> None:
    eager, data, _ = prepare()
    compiled = copy.deepcopy(eager)
    row = reconstruct(eager, data, SHORT, progress=False).rows[0]
    other = reconstruct(compiled, data, replace(SHORT, compile=True, bfloat16=True), progress=False).rows[0]
    assert other.kept == "learned"
    assert other.loss_before == row.loss_before
    assert other.loss_after == pytest.approx(row.loss_after, rel=0.1)
