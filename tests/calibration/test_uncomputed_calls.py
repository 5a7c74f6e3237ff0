"""Calls whose results nobody wants cost no arithmetic, and read no weights."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dit_ao import collect_samples
from fp4dit_ao.calibration.uncomputed_calls import uncomputed
from tests.tiny import CALL, tiny_pipeline


class Halves(nn.Module):
    """Gives shapes that depend on sizes, or, asked for that, on values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)

    def forward(self, x: Tensor, kept: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.fc(x)
        return (y[x[:, 0] > 0] if kept else y.chunk(2, -1)[0]), {"half": y.half()}


def test_zeros_of_the_right_shapes_and_types() -> None:
    model, x = Halves(), torch.randn(3, 4)
    nn.init.constant_(model.fc.weight, float("nan"))
    signature = inspect.signature(model.forward)
    with uncomputed([model]):
        assert inspect.signature(model.forward) == signature
        first, second = model(x)
    assert first.shape == (3, 4) and second["half"].dtype == torch.float16
    assert not first.any() and not second["half"].any()  # the weights, which are NaN, were not read
    assert type(first) is Tensor and model(x)[0].isnan().all()  # and computes again


def test_what_needs_values_is_computed() -> None:
    model, x = Halves(), torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    expected = model(x, kept=True)[0]
    with uncomputed([model]):
        torch.testing.assert_close(model(x, kept=True)[0], expected)


def test_equal_shapes_are_found_once() -> None:
    model, x = Halves(), torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    seen = []
    model.fc.register_forward_hook(lambda *_: seen.append(0))
    with uncomputed([model]):
        first, _ = model(x)
        again, _ = model(-x)
        assert (len(seen), again.shape, again.stride()) == (1, first.shape, (4, 1))
        model(x[:1])
        assert len(seen) == 2


def test_a_pipelines_first_call_is_the_same() -> None:
    pipe: Any = tiny_pipeline(layers=1)
    how: dict[str, Any] = {"prompts": ["a red cat"], "samples": 1, "progress": False, **CALL}
    (expected,) = collect_samples(pipe, **how)
    with uncomputed([pipe.transformer]):
        (found,) = collect_samples(pipe, **how)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items() if isinstance(x, Tensor))


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Halves()
    with pytest.raises(KeyError), uncomputed([model]):
        raise KeyError
    assert "forward" not in vars(model)


def test_a_forward_of_the_instances_own_comes_back() -> None:
    """Hooks of accelerate put one there, and would be lost with it."""
    model = Halves()

    def own(x: Tensor) -> Tensor:
        return x + 1

    model.forward = own  # type: ignore[assignment]
    with uncomputed([model]):
        assert not model(torch.ones(2, 4)).any()
    assert model.forward is own
