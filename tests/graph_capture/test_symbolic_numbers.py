"""Numbers of sizes stay symbols while a model of diffusers is captured."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fp4dit_ao import capture
from fp4dit_ao.graph_capture.symbolic_numbers import numbers_kept_symbolic

SOURCE = """
import functools
import torch
from torch import nn

class Sized(nn.Module):
    def forward(self, x):
        longer, shorter = max(x.shape[0], x.shape[1], 2), min(x.shape)
        sizes = torch.tensor([len(x), int(x.shape[1] / 2)], device=x.device)
        return torch.arange(longer), torch.zeros(shorter), sizes, torch.as_tensor(int(x.shape[1])), self.cached(len(x))

    @functools.lru_cache
    def cached(self, size):
        return torch.ones(size)
"""


@pytest.fixture
def sized(monkeypatch) -> nn.Module:
    module = ModuleType("diffusers.sized")
    monkeypatch.setitem(sys.modules, "diffusers.sized", module)
    exec(SOURCE, vars(module))
    return module.Sized()


@pytest.mark.parametrize("shape", [(3, 8), (7, 4), (5, 5)])
def test_captured_at_one_shape_and_equal_at_others(sized, shape) -> None:
    graph = capture(sized, {"x": torch.ones(4, 6)})
    expected, found = sized(torch.ones(shape)), graph(torch.ones(shape))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pythons_own_functions_are_back_afterwards(sized) -> None:
    space = vars(sys.modules["diffusers.sized"])
    before = dict(space)
    with numbers_kept_symbolic(sized):
        assert space["max"] is not max
        assert space["max"]([3, 1], default=0) == 3 and space["min"](3, 1) == 1 and space["int"]("12") == 12
        assert space["len"]("four") == 4 and isinstance(5, space["int"])
    assert space == before
