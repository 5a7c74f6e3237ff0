"""Dropped quantization: what is drawn, what it is learned on, and that the same seed learns the same bits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4dit_ao import ReconstructionConfig, reconstruct
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.reconstruction import engine
from fp4dit_ao.passes.reconstruction.dropping import Dropping
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES, PredictionDifference
from fp4dit_ao.passes.reconstruction.unit_error import UnitError, settled
from tests.passes.reconstruction.objectives.test_network_objectives import relative
from tests.passes.reconstruction.test_reconstruct import codes, prepare


def units(prepared: Any, data: Any, look: Any) -> None:
    """Calls ``look(index, error)`` for each unit while its data stands around it."""

    def seen(error: UnitError, rule: Any, config: Any, index: int, bar: Any) -> Any:
        look(index, error)
        return original(error, rule, ReconstructionConfig(iters=0), index, bar)

    original = engine.round_unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "round_unit", seen)
        reconstruct(prepared, data, ReconstructionConfig(objective="prediction_difference"), progress=False)


@torch.no_grad()
def test_where_all_is_dropped_weights_alone_are_quantized() -> None:
    """The unit's error on full-precision inputs, the prediction's on quantized ones, both without activations quantized."""
    prepared, data, model = prepare(layers=2)
    stacked = {name: torch.cat([sample[name] for sample in data]) for name in data[0]}
    found: list[float] = []
    quantized: list[Tensor] = []

    def look(index: int, error: UnitError) -> None:
        if index == 1:
            batch, dropping = error.gather(0, slice(0, 8)), Dropping(1.0, "0")
            quantized.append(batch.inputs[0] if batch.inputs[0].ndim == 3 else batch.inputs[1])
            with settled(error.segment), dropping.drawn(error.graph, torch.device("cpu"), 0):
                found.append(float(error.of(batch, error.graph, dropping)))
            weights.update({o.name: o.dequantized(w) for o, w in error.weights.items()})

    weights: dict[str, Tensor] = {}
    units(prepared, data, look)
    block = copy.deepcopy(model.blocks[1])
    for name, weight in weights.items():
        block.get_parameter(name.removeprefix("blocks.1.")).data.copy_(weight)
    hidden = model.blocks[0](model.pos_embedder(stacked["hidden_states"]), stacked["shift"])
    (inside,) = [x for x in quantized if x.shape == hidden.shape]
    assert not torch.equal(inside, hidden)
    full = model.blocks[1](hidden, stacked["shift"])
    unit = relative(block(hidden, stacked["shift"]), full)
    prediction = relative(model.proj_out(block(inside, stacked["shift"])), model.proj_out(full))
    assert found[0] == pytest.approx(float(unit + prediction), rel=1e-4)


def test_elements_are_drawn_alone_and_again_by_the_same_numbers() -> None:
    prepared, _, _ = prepare()
    set_fake_quantize(prepared, True, True)
    observer = next(m for name, m in prepared.named_modules() if hasattr(m, "drop") and m.name.endswith("ff.up.input"))
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    rounded, changed = observer(x), {}
    state = torch.get_rng_state()
    for numbers in ((0, 1), (0, 2), (0, 1)):
        dropping = Dropping(0.5, "7 0")
        with dropping.drawn(prepared, torch.device("cpu"), *numbers):
            assert observer.drop == 0.5
            found = observer(x)
            (mixed, whole) = dropping.mixed([rounded, 3], [x, 3])
        assert bool(((found == x) | (found == rounded)).all()) and bool(((mixed == x) | (mixed == rounded)).all())
        assert whole == 3
        differ = x != rounded
        share = float((found == x)[differ].float().mean())
        assert abs(share - 0.5) < 5 * 0.5 / float(differ.sum()) ** 0.5
        assert numbers not in changed or torch.equal(found, changed[numbers])
        changed[numbers] = found
    assert not torch.equal(changed[0, 1], changed[0, 2])
    assert torch.equal(torch.get_rng_state(), state) and observer.drop == 0
    assert torch.equal(observer(x), rounded)


def test_the_same_seed_learns_the_same_bits_and_others_or_none_dropped_do_not(monkeypatch: Any) -> None:
    prepared, data, _ = prepare()
    found = []
    for seed, drop in ((0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)):
        monkeypatch.setitem(OBJECTIVES._methods, "prediction_difference", PredictionDifference(drop=drop))
        graph = copy.deepcopy(prepared)
        torch.manual_seed(len(found))
        settings: dict[str, Any] = {"iters": 8, "batch_size": 8, "lr": 0.02, "seed": seed}
        config = ReconstructionConfig("sign_gradient", "prediction_difference", **settings)
        assert reconstruct(graph, data, config, progress=False).rows[0].kept == "learned"
        found.append(torch.cat([c.flatten() for c in codes(graph) if c is not None]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])
