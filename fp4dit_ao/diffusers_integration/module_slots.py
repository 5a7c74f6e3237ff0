""":class:`Slots`: fills a float model with stored codes and scales."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint import graph_tensors
from fp4dit_ao.checkpoint.quantization_record import Record
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.schemes import scheme_of

if TYPE_CHECKING:
    from diffusers import ModelMixin


def check_online(record: Record) -> None:
    """Raises ``ValueError`` if a layer was quantized in a way that only the graph form can execute."""
    for decision in record.decisions:
        if decision.config is not None and not scheme_of(decision.config).quantizes_online(decision.config):
            raise ValueError(
                f"{decision.name} quantizes its input in a static range, which only the graph form computes; use "
                "form='graph', or a recipe that quantizes inputs online"
            )
        if decision.config is not None and decision.config.attention_probabilities is not None:
            raise ValueError(
                f"{decision.name} was quantized with attention_probabilities, which only the graph form computes; use "
                "form='graph'"
            )


def quantized_linears(record: Record) -> Iterable[tuple[str, QuantConfig]]:
    """Yields (name, config) of every linear with a low-bit weight.

    Raises:
        ValueError: only the graph form can execute a config.
    """
    check_online(record)
    for decision in record.decisions:
        if decision.config is not None and decision.kind == "linear":
            yield decision.name, decision.config


class Slots:
    """Float model that is opened, so that its state dict has the names of the stored tensors, filled, and closed.

    Args:
        model: a model on the meta device; it is changed: every quantized weight becomes a module of codes and scales.
        record: record of the tensors that will be put in.

    Raises:
        ValueError: the record does not fit the model.
    """

    def __init__(self, model: "ModelMixin", record: Record):
        self.model, self.record = model, record
        for transform in record.transforms:
            transform.apply_to_modules(model)
        self._linears = dict(quantized_linears(record))
        for name, config in self._linears.items():
            self._open(name, config)
        self.constants = sorted(set(record.tensors) - set(dict(graph_tensors.tensors_of(model))))
        for name in self.constants:  # tensors that a graph has, and its model makes anew in every call
            entry = record.tensors[name]
            x = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
            try:
                owner = model.get_submodule(name.rpartition(".")[0])
            except AttributeError:
                raise ValueError(f"{type(model).__name__} has no place for tensor {name}") from None
            owner.register_buffer(name.rpartition(".")[2], x)
        self._transient = _compat.make_buffers_persistent(model, set(record.tensors))
        self._waiting = dict.fromkeys(model.state_dict())
        missing = [name for name in self._waiting if name not in record.tensors]
        if missing:
            raise ValueError(f"it lacks tensor {missing[0]} of {type(model).__name__} ({len(missing)} in all)")
        for name, x in model.state_dict().items():
            if tuple(x.shape) != record.tensors[name].shape:
                raise ValueError(
                    f"tensor {name} is {record.tensors[name].shape}, where {type(model).__name__} has {tuple(x.shape)}"
                )

    def _open(self, name: str, config: QuantConfig) -> None:
        try:
            linear = self.model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{type(self.model).__name__} has no linear {name}, which was quantized")
        parts = nn.Module()
        for part, x in scheme_of(config).empty_parts(linear.weight.shape, config).items():
            parts.register_buffer(part, x)
        del linear.weight
        linear.add_module("weight", parts)

    def put(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """Puts ``x``, one of the record's tensors, in its place, cast to ``dtype`` unless it is quantized or
        integer."""
        quantized = name.rpartition(".weight.")[0] in self._linears
        if dtype is not None and x.is_floating_point() and not quantized:
            x = x.to(dtype)
        graph_tensors.put_tensor(self.model, name, x)
        self._waiting.pop(name, None)

    def close(self, dtype: torch.dtype | None = None) -> "ModelMixin":
        """Builds the quantized weights and returns the model, ready for ``module_form.finish``.

        Args:
            dtype: reported dtype of quantized weights; the record's if None.

        Raises:
            ValueError: a tensor was not put in.
        """
        if self._waiting:
            raise ValueError(
                f"tensor {next(iter(self._waiting))} is missing ({len(self._waiting)} in all); copy the folder again"
            )
        for name, config in self._linears.items():
            linear = self.model.get_submodule(name)
            parts = dict(linear.weight.named_buffers())  # type: ignore[union-attr,operator]
            del linear.weight
            weight = scheme_of(config).from_parts(parts, config, dtype or self.record.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        for transform in self.record.transforms:
            for name, original in transform.shared_tensors().items():
                graph_tensors.put_tensor(self.model, name, graph_tensors.tensor_at(self.model, original))
        _compat.make_buffers_transient(self._transient)
        for name in self.constants:
            self.record.constants[name] = graph_tensors.tensor_at(self.model, name)
            delattr(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        return self.model
