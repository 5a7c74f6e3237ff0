"""Every selection keeps its contract; the uniform one is even, the other follows the paper's formula."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp4dit_ao import collect_samples
from fp4dit_ao.calibration import SELECTIONS
from fp4dit_ao.calibration.sample_selection import DensityDiversity, apportion, check_chosen
from fp4dit_ao.util.registry import Registry
from tests.tiny import CALL, tiny_pipeline


def features(calls: int, seed: int = 0) -> Tensor:
    return torch.randn(calls, 6, generator=torch.Generator().manual_seed(seed))


# --- contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SELECTIONS))
@given(calls=st.integers(1, 50), batches=st.integers(1, 40), data=st.data())
def test_every_selection_keeps_the_contract(name: str, calls: int, batches: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, calls * batches))
    choose = SELECTIONS[name]
    given_features = features(calls) if choose.needs_features else None
    chosen = choose(calls, batches, count, given_features)
    cells = [(batch, call) for batch, kept in chosen.items() for call in kept]
    assert len(cells) == len(set(cells)) == count
    assert all(0 <= batch < batches and 0 <= call < calls for batch, call in cells)
    assert all(kept and kept == sorted(kept) for kept in chosen.values())
    assert chosen == choose(calls, batches, count, given_features)
    check_chosen(chosen, calls, batches, count, name)
    per_batch = Counter(batch for batch, _ in cells)
    assert max(per_batch.values()) - min(per_batch.get(i, 0) for i in range(batches)) <= 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({0: [0]}, r"'odd' chose 1 samples, 2 were asked for"),
        ({0: [1, 0]}, r"'odd' chose calls \[1, 0\] of batch 0; give ascending numbers below 2 of batches below 2"),
        ({0: [1, 1]}, "ascending"),
        ({0: [0, 2]}, "below 2"),
        ({0: [-1, 1]}, "below 2"),
        ({2: [0, 1]}, "of batch 2"),
        ({0: [0, 1], 1: []}, r"chose calls \[\] of batch 1"),
    ],
)
def test_a_choice_that_breaks_the_contract_is_refused(chosen: dict[int, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_chosen(chosen, 2, 2, 2, "odd")


# --- uniform ---------------------------------------------------------------------------------------------------------


@given(calls=st.integers(1, 50), batches=st.integers(1, 40), data=st.data())
def test_uniform_takes_every_call_equally_often(calls: int, batches: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, calls * batches))
    per_call = Counter(call for kept in SELECTIONS["uniform"](calls, batches, count).values() for call in kept)
    assert max(per_call.values()) - min(per_call.get(i, 0) for i in range(calls)) <= 1


def test_uniform_is_the_choice_that_it_always_was() -> None:
    assert SELECTIONS["uniform"](5, 3, 7) == {0: [0, 2, 4], 1: [1, 3], 2: [2, 4]}
    assert SELECTIONS["uniform"](4, 2, 2) == {0: [1], 1: [3]}


# --- density and diversity -------------------------------------------------------------------------------------------


def test_weights_are_the_papers_formula() -> None:
    f = features(7)
    method = DensityDiversity(radius=1.6, diversity=1.2)
    rows = f.double().tolist()
    mean_square = sum(x * x for row in rows for x in row) / f.numel()

    def mse(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    def unit(values: list[float]) -> list[float]:
        return [(value - min(values)) / (max(values) - min(values)) for value in values]

    density = unit([sum(mse(a, b) <= 1.6 * mean_square for b in rows) for a in rows])
    diversity = unit([sum(1 - cosine(a, b) for b in rows) for a in rows])
    assert len(set(density)) > 2
    expected = [d + 1.2 * v for d, v in zip(density, diversity, strict=True)]
    torch.testing.assert_close(method.weights(f), torch.tensor(expected, dtype=torch.float64))


def test_the_choice_does_not_depend_on_the_size_of_features() -> None:
    choose = SELECTIONS["density_diversity"]
    assert choose(9, 4, 13, features(9)) == choose(9, 4, 13, 1000 * features(9))


def test_equal_features_give_equal_shares() -> None:
    chosen = SELECTIONS["density_diversity"](4, 3, 8, torch.ones(4, 6))
    assert Counter(call for kept in chosen.values() for call in kept) == {0: 2, 1: 2, 2: 2, 3: 2}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers(0, 200))
def test_shares_are_within_one_of_their_quotas(weights: list[float], total: int) -> None:
    shares = apportion(weights, total, most=total)
    assert sum(shares) == total
    whole = sum(weights)
    quotas = [total * (weight / whole if whole else 1 / len(weights)) for weight in weights]
    assert all(abs(share - quota) < 1 + 1e-9 * total for share, quota in zip(shares, quotas, strict=True))


def test_shares_have_a_limit() -> None:
    assert apportion([100.0, 1.0, 0.0], 7, most=3) == [3, 3, 1]


@pytest.mark.parametrize("given_features", [None, torch.ones(3, 6)])
def test_missing_features_are_refused(given_features: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"one row of features for each of 4 calls, found (none|3)"):
        SELECTIONS["density_diversity"](4, 1, 2, given_features)


# --- with a pipeline -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(layers=3)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A selection named "spied" that keeps the last calls and remembers what it was given."""
    seen: list[Any] = []

    class Spied:
        needs_features = True

        def __call__(
            self, calls: int, batches: int, samples: int, features: Tensor | None = None
        ) -> dict[int, list[int]]:
            seen.append((calls, batches, samples, features))
            return {1: list(range(calls - samples, calls))}

    registry: Registry[Any] = Registry("sample selection")
    registry.register("spied", Spied(), summary="Last calls.")
    monkeypatch.setattr("fp4dit_ao.calibration.collection.SELECTIONS", registry)
    yield seen


def test_a_selection_is_given_features_and_decides(pipe: Any, spied: list[Any]) -> None:
    outputs: list[Tensor] = []
    hook = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda _, args, y: outputs.append(y))
    call = CALL | {"num_inference_steps": 4}
    samples = collect_samples(pipe, ["red cat", "blue dog"], samples=2, selection="spied", progress=False, **call)
    hook.remove()
    [(calls, batches, count, given_features)] = spied
    assert (calls, batches, count) == (4, 2, 2)
    expected = torch.stack(
        [y.mean(1).flatten() for y in outputs[:4]]
    )  # (batch, tokens, channels) of the first trajectory
    torch.testing.assert_close(given_features, expected)
    pipe.scheduler.set_timesteps(4)
    assert [float(s["timestep"][0]) for s in samples] == pipe.scheduler.timesteps[2:].tolist()
    assert not pipe.transformer.transformer_blocks[1]._forward_hooks


def test_density_and_diversity_on_a_pipeline(pipe: Any) -> None:
    call = CALL | {"num_inference_steps": 4}
    samples = collect_samples(
        pipe, ["red cat", "blue dog"], samples=5, selection="density_diversity", progress=False, **call
    )
    assert len(samples) == 5
    uniform = collect_samples(pipe, ["red cat", "blue dog"], samples=5, progress=False, **call)
    assert [float(s["timestep"][0]) for s in samples] != [float(s["timestep"][0]) for s in uniform]


def test_a_transformer_without_blocks_has_no_features(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.ModuleList, "__len__", lambda self: 0)
    monkeypatch.setattr(torch.nn.ModuleList, "__iter__", lambda self: iter(()))
    with pytest.raises(ValueError, match=r"no nn\.ModuleList of blocks to take features from; use selection='uniform'"):
        collect_samples(pipe, ["red cat"], samples=2, selection="density_diversity", progress=False, **CALL)
