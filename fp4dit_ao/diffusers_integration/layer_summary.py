"""One row per layer of a quantized transformer: :class:`LayerSummary`; which unit computes it, and the rows as text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao.formats import parse
from fp4dit_ao.kernels.attention import ATTENTION, LARGEST_HEAD, AttentionOperands
from fp4dit_ao.passes.graph_products import weight_named
from fp4dit_ao.quantizer import Decision
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight


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
        probabilities: format of an attention's probabilities; None if they are not quantized.
    """

    name: str
    kind: str
    weight: str | None
    activation: str | None
    shape: tuple[int, ...] | None
    bytes: int
    quantized: bool
    reason: str
    probabilities: str | None = None


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
            fmt, inside = (config.attention, config.attention_probabilities) if config else (None, None)
            quantized = fmt is not None or inside is not None
            row = LayerSummary(decision.name, "attention", None, fmt, None, 0, quantized, decision.reason, inside)
            rows.append(row)
            continue
        weight = weight_named(weights, decision.name)
        shape, size, kept = None, 0, None
        if weight is not None:
            shape, kept = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
            size = weight.nbytes
        fmt, activation = (config.weight, config.activation) if config else (kept, None)
        quantized, reason = config is not None, decision.reason
        if fmt is not None and quantized and weight is not None and not isinstance(weight.detach(), TorchAOBaseTensor):
            fmt, activation, quantized, reason = kept, None, False, f"unpacked from {fmt}"
        rows.append(LayerSummary(decision.name, decision.kind, fmt, activation, shape, size, quantized, reason))
    return rows


def unit_of(row: LayerSummary, weight: LowBitWeight | None, device: torch.device) -> str:
    """Name of the kernel that computes a layer on ``device``, taken from the table that the layer itself uses.

    Args:
        row: the layer.
        weight: its low-bit weight; None if it has none.
        device: where it would run.
    """
    if weight is not None:
        return str(weight.unit(device))
    if row.probabilities is not None:
        return "float32 products, plain operators"
    if row.kind == "attention" and row.activation is not None:
        return str(ATTENTION.pick(AttentionOperands(parse(row.activation), device, LARGEST_HEAD)))
    return "float"


def beside_weights(graph: GraphModule, rows: Iterable[LayerSummary]) -> int:
    """Elements of what transforms keep with the quantized linears, such as branches of low rank."""
    linears = {row.name for row in rows if row.kind == "linear" and row.quantized}
    return sum(x.numel() for name, x in graph.named_buffers() if name.rpartition(".")[0] in linears)


def bits_per_weight(rows: Iterable[LayerSummary], beside: int = 0) -> float:
    """Stored bits per weight of the quantized linears, scales included; 16 if there are none.

    Args:
        rows: the layers.
        beside: numbers that are kept beside the weights, counted at 16 bits each; see :func:`beside_weights`.
    """
    linears = [row for row in rows if row.kind == "linear" and row.quantized and row.shape]
    weights = sum(math.prod(row.shape) for row in linears if row.shape)
    return (8 * sum(row.bytes for row in linears) + 16 * beside) / weights if weights else 16.0


def layer_lines(rows: Sequence[LayerSummary], unit: Callable[[LayerSummary], str]) -> list[str]:
    """Aligned lines of text: name, shape, formats, and the unit that computes a layer, or why it is in high precision.

    Layers that differ in the number of their block alone share a line.

    Args:
        rows: the layers.
        unit: name of the unit that computes a quantized layer.
    """
    numbers: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        before, number, after = _numbered(row.name)
        shape = "×".join(map(str, row.shape)) if row.shape else "q, k, v" if row.kind == "attention" else ""
        formats = " × ".join(fmt for fmt in (row.weight, row.activation, row.probabilities) if fmt)
        cells = shape, formats, unit(row) if row.quantized else row.reason
        found = numbers.setdefault((before, after, *cells), [])
        if number is not None:
            found.append(number)
    lines = [(f"{before}{_ranges(found)}{after}", *cells) for (before, after, *cells), found in numbers.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(3)] if lines else []
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]) for line in lines
    ]


def _numbered(name: str) -> tuple[str, int | None, str]:
    """A name before, at and after its first part that is a number."""
    parts = name.split(".")
    place = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if place is None:
        return name, None, ""
    before, after = parts[:place], parts[place + 1 :]
    return ".".join([*before, ""]), int(parts[place]), ".".join(["", *after] if after else [])


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: ``"3"``, or in braces, consecutive ones joined: ``"{0-5, 7}"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ", ".join(texts) + "}" if len(numbers) > 1 else "".join(texts)
