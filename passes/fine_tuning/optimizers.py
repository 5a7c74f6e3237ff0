"""Optimizers of fine-tuning behind one small contract, whose states can be saved and restored."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp4dit_ao.passes.fine_tuning.student import ParameterGroup
from fp4dit_ao.passes.fine_tuning.training_state import State


class Stepper(Protocol):
    """An optimizer of some of what is trained."""

    def zero_grad(self) -> None:
        """Forgets gradients."""

    def step(self, pace: float) -> None:
        """Takes a step on the accumulated gradients, with ``pace`` (1 at first) times the learning rates."""

    def state(self) -> State:
        """All that a resumed run needs."""

    def restore(self, state: State) -> None:
        """Goes on from what :meth:`state` gave."""


class Adam:
    """Adam without weight decay.

    Args:
        groups: at least one parameter in all.
    """

    def __init__(self, groups: Sequence[ParameterGroup]):
        # one weight's share of millions in the gradient is far below the usual epsilon, 1e-8
        self._optimizer = torch.optim.Adam([dict(group) for group in groups if group["params"]], eps=1e-20)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._parameters = [p for group in self._optimizer.param_groups for p in group["params"]]

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, pace: float) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * pace
        self._optimizer.step()

    def state(self) -> State:
        return [dict(self._optimizer.state.get(p, {})) for p in self._parameters]

    def restore(self, state: State) -> None:
        for parameter, values in zip(self._parameters, state, strict=True):
            if values:
                self._optimizer.state[parameter] = {
                    name: x if name == "step" else x.to(parameter.device) for name, x in values.items()
                }


def nbytes_of(state: State) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(map(nbytes_of, parts))
