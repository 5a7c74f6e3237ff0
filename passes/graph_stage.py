"""Stages of a graph (float, prepared, quantized), so that a function of another stage can refuse it in a sentence."""

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao.observers import FloatObserver


def require_graph(model: object, who: str, expected: str) -> None:
    """Raises ``ValueError`` if ``model`` is no graph.

    Args:
        model: what ``who`` was called with.
        who: name of the function, for the message.
        expected: what it should be, for the message.
    """
    if not isinstance(model, GraphModule):
        raise ValueError(f"{who}: found {type(model).__name__}, which is no graph; give it {expected}")


def is_observed(model: GraphModule) -> bool:
    """Whether the graph calls an observer: it is prepared, and not converted."""
    called = (model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module")
    return any(isinstance(module, FloatObserver) for module in called)


def is_quantized(model: GraphModule) -> bool:
    """Whether the graph has low-bit weights or operators of this package: it is converted or lowered."""
    weights = (parameter.detach() for parameter in model.parameters())
    own = any(getattr(node.target, "namespace", "") == "fp4dit_ao" for node in model.graph.nodes)
    return own or any(isinstance(x, TorchAOBaseTensor) for x in weights)


def misfit(model: GraphModule, values: Mapping[str, object]) -> str | None:
    """How a sample differs from the one that ``model`` was exported with, where that may be why it cannot be computed.

    Args:
        model: a captured or exported graph.
        values: values of its placeholders, by node name.

    Returns:
        a sentence with the remedy; None if they have equal types, ranks, and sizes wherever the graph has constants.
    """
    for node in model.graph.nodes:
        captured, value = node.meta.get("val"), values.get(node.name)
        if node.op != "placeholder" or not isinstance(captured, Tensor) or not isinstance(value, Tensor):
            continue
        if value.dtype != captured.dtype:
            return f"{node.name} is {value.dtype}, and the graph was exported with {captured.dtype}: cast it"
        fixed = [size if isinstance(size, int) else None for size in captured.shape]
        shown = "×".join("any" if size is None else str(size) for size in fixed)
        if value.ndim != len(fixed) or any(
            size not in (None, found) for size, found in zip(fixed, value.shape, strict=True)
        ):
            return (
                f"{node.name} has shape {tuple(value.shape)}, and the graph was exported for {shown}: give samples of that "
                "shape, or export with dynamic_shapes"
            )
    return None
