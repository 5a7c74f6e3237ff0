"""The state of a fine-tuning in one file: whatever its parts consist of, and the step it belongs to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao.passes.fine_tuning.fine_tune import FineTuneConfig
from fp4dit_ao.passes.fingerprint import fingerprint as hash_of
from fp4dit_ao.util.tensor_state import load_state, save_state
from fp4dit_ao.util.world import World

State = Any
"""Dictionaries (of text), lists, tensors, numbers, texts and None, one inside the other."""


class TrainingState:
    """A file that holds the state of one run.

    Args:
        path: the file.
        fingerprint: hash of everything that the result depends on.
        world: the processes that take the same steps; the first one reads and writes for all.
    """

    def __init__(self, path: Path, fingerprint: str, world: World):
        self.path, self.fingerprint, self.world = path, fingerprint, world

    def save(self, state: State, step: int) -> None:
        """Writes the state after ``step`` steps, whole or not at all."""
        if not self.world.first:
            return
        tensors: dict[str, Tensor] = {}
        texts = {"fingerprint": self.fingerprint, "step": str(step), "state": json.dumps(_flat(state, tensors))}
        save_state(self.path, tensors, texts)

    def load(self) -> tuple[State, int]:
        """The state and the number of steps that it holds; (None, 0) if nothing was saved.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        return self.world.agreed(self._read)

    def _read(self) -> tuple[State, int]:
        if not self.path.exists():
            return None, 0
        tensors, texts = load_state(self.path, "delete it to start anew")
        if texts.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{self.path} belongs to another run (other settings, weights or samples); repeat the settings of "
                "that run, or delete it to start anew"
            )
        return _nested(json.loads(texts["state"]), tensors), int(texts["step"])


def _flat(state: State, tensors: dict[str, Tensor]) -> State:
    """``state`` for JSON: every tensor is put into ``tensors``, and its place taken by ``{"tensor": key}``."""
    if isinstance(state, Tensor):
        tensors[key := str(len(tensors))] = state
        return {"tensor": key}
    if isinstance(state, Mapping):
        return {"items": {name: _flat(value, tensors) for name, value in state.items()}}
    return [_flat(value, tensors) for value in state] if isinstance(state, list | tuple) else state


def _nested(flat: State, tensors: Mapping[str, Tensor]) -> State:
    """What :func:`_flat` was given; tuples come back as lists."""
    if isinstance(flat, list):
        return [_nested(value, tensors) for value in flat]
    if isinstance(flat, Mapping):
        if "tensor" in flat:
            return tensors[flat["tensor"]]
        return {name: _nested(value, tensors) for name, value in flat["items"].items()}
    return flat


def fingerprint(
    prepared: GraphModule, samples: Sequence[Mapping[str, object]], config: FineTuneConfig, method: str
) -> str:
    """SHA-256 of everything that the result depends on; how often it is saved and what is computed again are no part of it."""
    settings = replace(config, save_every=1, checkpoint_activations=True)
    return hash_of(repr((method, *astuple(settings))), prepared, samples)
