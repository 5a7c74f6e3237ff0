"""Timing of linears: turns and rounds are counted on a made-up clock, and all ways compute the same linear."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fp4dit_ao import MinifloatTensor, QuantConfig
from fp4dit_ao._compat import pytree
from fp4dit_ao.evaluation import layer_timing
from fp4dit_ao.evaluation.layer_timing import LEAST_ROUNDS, MOST_ROUNDS, OURS, WARM_UP, LayerSpeed, in_turns, summary
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.schemes import scheme_of

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a timer says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.diary: list[str] = []

    def __call__(self) -> float:
        return self.now

    def timer(self, name: str, seconds: float):
        def turn() -> float:
            self.diary.append(name)
            self.now += seconds
            return seconds

        return turn


@pytest.mark.parametrize(
    ("each", "seconds", "rounds"), [(0.5, 4.0, 4), (0.5, 0.1, LEAST_ROUNDS), (0.001, 1000.0, MOST_ROUNDS)]
)
def test_ways_take_turns_until_the_time_is_used(each, seconds, rounds) -> None:
    clock = Clock()
    found = in_turns({name: clock.timer(name, each) for name in "ab"}, seconds, clock)
    assert len(found) == rounds
    assert "".join(clock.diary) == "ab" * (WARM_UP + rounds)
    assert found[0] == {"a": each, "b": each}


def test_the_quicker_way_of_bfloat16_counts_in_every_round() -> None:
    rounds = [{OURS: 1.0, "x": 3.0, "y": 2.0}, {OURS: 2.0, "x": 3.0, "y": 4.0}, {OURS: 1.0, "x": 4.0, "y": 9.0}]
    assert summary(rounds) == LayerSpeed(seconds=1.0, bfloat16=3.0, speed=2.0, steady=True)


def test_load_on_the_machine_cancels_and_is_noticed() -> None:
    rounds = [{OURS: load, "x": 1.5 * load} for load in (1.0, 7.0, 0.3)]
    assert summary(rounds).speed == pytest.approx(1.5)
    assert not summary(rounds).steady
    assert summary([{OURS: load, "x": load} for load in (1.0, 1.9, 9.0)]).steady
    assert not summary([{OURS: 1.0, "x": load} for load in (1.0, 2.1, 9.0)]).steady


def results(calls) -> list[torch.Tensor]:
    return pytree.tree_leaves([call() for call in calls])


@pytest.mark.parametrize("together", [False, True])
@torch.no_grad()
def test_all_ways_call_every_weight_with_the_same_tokens(together, monkeypatch) -> None:
    weights = [MinifloatTensor.from_hp(torch.randn(48, 64), [1, 32], "e2m1", "e2m3") for _ in range(3)]
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(layer_timing, "_all", lambda calls: seen.append(torch.stack(results(calls))))
    x = torch.randn(5, 64).bfloat16()
    ways = layer_timing._ways(x, [weights] if together else [[weight] for weight in weights], CPU)
    has_bfloat16 = bool(layer_timing._prepacked(x, [torch.ones(48, 64).bfloat16()]))
    assert list(ways) == [OURS, "bfloat16", "bfloat16, prepacked" if has_bfloat16 else "float32"]
    for way in ways.values():
        way()
    ours, *others = seen
    for name, found in zip(ways, seen, strict=True):
        assert found.shape == (3, 5, 48) and found.dtype == (torch.float32 if name == "float32" else torch.bfloat16)
    assert torch.equal(ours, torch.stack([F.linear(x, weight) for weight in weights]))
    for other in others:
        exact = torch.stack([F.linear(x.float(), weight.dequantize(torch.float32)) for weight in weights])
        assert (other.float() - exact).norm() < 0.01 * exact.norm()


class Operators(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("rows", [3, 2000])
@torch.no_grad()
def test_ours_are_the_operators_of_a_compiled_graph(rows: int, together: int) -> None:
    """One quantizes the tokens of all linears that share them, however few they are, and one for each linear multiplies."""
    config = QuantConfig.from_name("w4a6_codebook")
    weights = [scheme_of(config).round_to_nearest("fc", torch.randn(48, 128), config) for _ in range(6)]
    x = torch.randn(rows, 128).bfloat16()
    groups = [weights[start : start + together] for start in range(0, 6, together)]
    calls = layer_timing.operators(x, groups)
    with Operators() as called:
        found = results(calls)
    own = [name for name in called.names if name.startswith("fp4dit_ao::")]
    expected = ["fp4dit_ao::int8_tokens"] if native.shared_object() is not None else []
    assert own == [*expected, *["fp4dit_ao::codebook_linear"] * together] * len(groups)
    assert len(called.names) - len(own) <= (6 if expected else 180)
    for weight, y in zip(weights, found, strict=True):
        assert torch.equal(y, F.linear(x, weight))


def test_a_measurement_is_positive_and_takes_no_more_weights_than_allowed(monkeypatch) -> None:
    weights = [MinifloatTensor.from_hp(torch.randn(16, 32), [1, 32], "e2m1", "e2m3") for _ in range(3)]
    counts = []
    monkeypatch.setattr(layer_timing, "MOST_BYTES", 2 * 2 * 16 * 32)
    monkeypatch.setattr(layer_timing, "LONG_CALL", 600.0)  # however busy the machine is
    original = layer_timing._ways
    monkeypatch.setattr(
        layer_timing, "_ways", lambda x, some, device: counts.append((*x.shape, len(some))) or original(x, some, device)
    )
    found = layer_timing.measure([[weight] for weight in weights], 7, CPU, 0.0)
    assert counts[-1] == (7, 32, 2)
    assert min(found[:3]) > 0
    layer_timing.measure([weights[:2], weights[1:]], 7, CPU, 0.0)
    assert counts[-1] == (7, 32, 1)
