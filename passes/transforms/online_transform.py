"""``OnlineTransform``: what transforms share that change a linear's input when it arrives, and its weight beforehand."""

import abc
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.annotated_linears import weight_path
from fp4dit_ao.passes.transforms.input_transform import ChangedGroup, InputTransform
from fp4dit_ao.passes.transforms.linear_groups import (
    calls_of,
    module_of,
    nodes_by_linear,
    readers_by_source,
    replace_parameter,
    stored_tensor,
    tensor_at,
)

Group = TypeVar("Group", bound=ChangedGroup)


class OnlineTransform(InputTransform, Generic[Group]):
    """An input transform whose groups have one tensor each, by which the input of all their linears is changed.

    Attributes:
        groups: what became of which linears; those that are best left alone are in none.
        fitted: whether the groups were found here, rather than read from a record: then weights are changed, too.
    """

    fits_single_file: ClassVar[bool] = False
    groups: Sequence[Group]

    def __init__(self, quantizer: Quantizer | None, rows: int):
        super().__init__(quantizer, rows)
        self.groups: Sequence[Group] = []
        self.fitted = False

    # --- what a subclass defines

    @abc.abstractmethod
    def shared_value(self, group: Group, like: Tensor) -> Tensor:
        """The group's tensor, where the weight ``like`` is; if not :attr:`fitted`, one that changes nothing, until the stored
        one takes its place."""

    @abc.abstractmethod
    def changed_weight(self, weight: Tensor, shared: Tensor) -> Tensor:
        """The weight ``(out_features, in_features)`` for changed inputs."""

    @abc.abstractmethod
    def changed_input(self, graph: GraphModule, reader: Node, source: Node, shared: Node, group: Group) -> Node:
        """Nodes, inserted where the graph is at, that change ``source`` before the linear ``reader`` reads it."""

    @abc.abstractmethod
    def changed_module(self, linear: nn.Linear, shared: Tensor, stored: bool) -> nn.Module:
        """The module that takes a linear's place; ``stored`` says whether ``shared`` is one of the model's own tensors."""

    # --- what it gets

    @torch.no_grad()
    def rewrite(self, graph: GraphModule) -> None:
        linears = nodes_by_linear(graph)
        for group in self.groups:
            nodes = calls_of(linears, group.linears, self.done)
            paths = list(dict.fromkeys(weight_path(node) for node in nodes))
            shared = self.shared_value(group, tensor_at(graph, paths[0]))
            for path in paths if self.fitted else []:
                replace_parameter(graph, path, self.changed_weight(tensor_at(graph, path), shared))
            for source, readers in readers_by_source(graph, nodes):
                with graph.graph.inserting_before(readers[0]):
                    stored = stored_tensor(graph, readers[0], self.shared_name(group), shared)
                    changed = self.changed_input(graph, readers[0], source, stored, group)
                for node in readers:
                    node.update_arg(0, changed)

    def apply_to_modules(self, model: nn.Module) -> None:
        for group in self.groups:
            shared: Tensor | None = None
            for name in group.linears:
                linear, first = module_of(model, name, self.done), shared is None
                if shared is None:
                    shared = self.shared_value(group, linear.weight)
                model.set_submodule(name, self.changed_module(linear, shared, stored=first))

    def refused_loras(self) -> dict[str, str]:
        """Every changed linear: fusing a LoRA does not know that its weight is for changed inputs."""
        why = f"whose input is {self.done}; quantize without the transform {self.name!r} to use it"
        return {name: why for group in self.groups for name in group.linears}

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        owner = name.rpartition(".")[0]
        for group in self.groups:
            if owner in group.linears and name.endswith(".weight"):
                return self.changed_weight(weight, tensor_at(graph, self.shared_name(group)).to(weight.device))
        return weight
