"""One row per layer of a quantized transformer: :class:`LayerSummary`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao.checkpoint import graph_tensors
from fp4dit_ao.quantizer import Decision


@dataclass(frozen=True)
class LayerSummary:
    """One row of :meth:`QuantizedTransformer.summary`.

    Attributes:
        name: fully qualified module name.
        kind: ``"linear"``, ``"attention"`` or ``"convolution"``.
        weight: number format of the weight, or its type if it stayed in high precision; None for an attention.
        activation: number format of the inputs (of q, k and v for an attention); None if they are not quantized.
        shape: shape of the weight, (out_features, in_features); None for an attention.
        bytes: bytes of the weight, scales included; 0 for an attention.
        quantized: whether the weight or an input is quantized.
        reason: the rule that chose the format, or the reason for high precision.
    """

    name: str
    kind: str
    weight: str | None
    activation: str | None
    shape: tuple[int, ...] | None
    bytes: int
    quantized: bool
    reason: str


def layer_summaries(decisions: Iterable[Decision], weights: Mapping[str, Tensor]) -> list[LayerSummary]:
    """One row per decision.

    Args:
        decisions: what became of every linear, attention and convolution.
        weights: parameters of the graph, by name.
    """
    rows = []
    for decision in decisions:
        config = decision.config
        if decision.kind == "attention":
            fmt = config.attention if config else None
            rows.append(LayerSummary(decision.name, "attention", None, fmt, None, 0, fmt is not None, decision.reason))
            continue
        weight = weights.get(f"{decision.name}.weight")
        shape, size, kept = None, 0, None
        if weight is not None:
            shape, kept = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
            size = sum(part.nbytes for part in graph_tensors.flatten("", weight.detach()).values())
        fmt, activation = (config.weight, config.activation) if config else (kept, None)
        quantized, reason = config is not None, decision.reason
        if fmt is not None and quantized and weight is not None and not isinstance(weight.detach(), TorchAOBaseTensor):
            fmt, activation, quantized, reason = kept, None, False, f"unpacked from {fmt}"
        rows.append(LayerSummary(decision.name, decision.kind, fmt, activation, shape, size, quantized, reason))
    return rows
