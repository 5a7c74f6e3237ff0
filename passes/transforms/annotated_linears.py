"""The linears of a graph that a quantizer would quantize, with the observers that it would put there."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationSpecBase, Quantizer, SharedQuantizationSpec

from fp4dit_ao.observers import FloatObserver

_ANNOTATION = "quantization_annotation"
_ATEN = torch.ops.aten
MakeObserver = Callable[[], FloatObserver]
"""Makes the observer of a weight or an input."""


@dataclass(frozen=True)
class AnnotatedLinear:
    """One linear of a graph, before it is prepared.

    Attributes:
        node: the call of ``aten.linear``.
        weight_observer: makes the observer of its weight.
        input_observer: makes the observer of its input; None if inputs are not quantized. Linears that share an observer have
            the same function here.
    """

    node: Node
    weight_observer: MakeObserver
    input_observer: MakeObserver | None

    @property
    def source(self) -> Node:
        """The node of the input, ``(…, in_features)``."""
        source = self.node.args[0]
        assert isinstance(source, Node)
        return source

    @property
    def weight(self) -> str:
        """Fully qualified name of the weight."""
        return weight_path(self.node)

    @property
    def name(self) -> str:
        """Fully qualified name of the module that owns the weight."""
        return linear_name(self.node)


def weight_path(node: Node) -> str:
    """Fully qualified name of the weight of a linear's node; ``""`` if it is computed, not stored."""
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, Node) and weight.op == "get_attr" else ""


def linear_name(node: Node) -> str:
    """Fully qualified name of the module that owns the weight of a linear's node."""
    return weight_path(node).rpartition(".")[0]


def crowded_modules(graph: GraphModule) -> set[str]:
    """Names of the modules that own the weights of several linears (``F.linear`` on parameters).

    Transforms keep what they add to a linear beside its weight, under the module's name; those linears they leave alone.
    """
    paths = {weight_path(node) for node in graph.graph.nodes if node.target is _ATEN.linear.default}
    owners = Counter(path.rpartition(".")[0] for path in paths if path)
    return {owner for owner, count in owners.items() if count > 1}


def annotated_linears(graph: GraphModule, quantizer: Quantizer) -> list[AnnotatedLinear]:
    """The linears that ``quantizer`` quantizes, in the order of the graph, which is left without annotations.

    Those that share their module with the weight of another linear are left out: see :func:`crowded_modules`.

    Raises:
        ValueError: what the quantizer raises.
    """
    quantizer.annotate(graph)
    found, crowded = [], crowded_modules(graph)
    for node in graph.graph.nodes:
        annotation = node.meta.get(_ANNOTATION)
        if node.target is not _ATEN.linear.default or annotation is None or not weight_path(node):
            continue
        if linear_name(node) in crowded:
            continue
        specs = annotation.input_qspec_map
        weight = _observer(specs.get(node.args[1]))
        if weight is not None:
            found.append(AnnotatedLinear(node, weight, _observer(specs.get(node.args[0]))))
    for node in graph.graph.nodes:
        node.meta.pop(_ANNOTATION, None)
    return found


def _observer(spec: QuantizationSpecBase | None) -> MakeObserver | None:
    while isinstance(spec, SharedQuantizationSpec):
        source, user = spec.edge_or_node
        spec = user.meta[_ANNOTATION].input_qspec_map[source]
    return None if spec is None else spec.observer_or_fake_quant_ctr
