"""The state of a fine-tuning in one file: whatever its parts consist of, and the step it belongs to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao._compat import pytree
from fp4dit_ao.passes.fine_tuning.fine_tune import FineTuneConfig
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.util.tensor_state import bytes_of, load_state, save_state

State = Any
"""Dictionaries (of text), lists, tensors, numbers, texts and None, one inside the other."""


class TrainingState:
    """A file that holds the state of one run.

    Args:
        path: of the file.
        fingerprint: of everything that the result depends on.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint

    def save(self, state: State, step: int) -> None:
        """Writes the state after ``step`` steps, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        texts = {"fingerprint": self.fingerprint, "step": str(step), "state": json.dumps(_flat(state, tensors))}
        save_state(self.path, tensors, texts)

    def load(self) -> tuple[State, int]:
        """The state and the number of steps that it holds; (None, 0) if nothing was saved.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
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
    """SHA-256 of everything that the result depends on: method, settings, graph, weights, scales, codes and samples."""
    digest = hashlib.sha256(repr((method, *astuple(config))).encode() + prepared.code.encode())
    tensors = [x for _, o in weight_observers(prepared) for x in (o.scale, o.codes) if x is not None]
    leaves = [leaf for sample in samples for leaf in pytree.tree_leaves(dict(sample))]
    for x in (*prepared.parameters(), *tensors, *leaves):
        digest.update(bytes_of(x) if isinstance(x, Tensor) else repr(x).encode())
    return digest.hexdigest()
