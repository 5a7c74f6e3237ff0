"""The error that linears would make if they were quantized: by which transforms choose."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.passes.transforms.annotated_linears import AnnotatedLinear, MakeObserver


class OutputError:
    """The output error that linears of one input would make, relative to their float outputs, as they are or changed.

    Args:
        linears: with their observers, by which weights and inputs are quantized.
        weights: float, ``(out_features, in_features)`` each.
        rows: of their common input, ``(rows, in_features)``.
    """

    def __init__(self, linears: Sequence[AnnotatedLinear], weights: Sequence[Tensor], rows: Tensor):
        self.linears = linears
        self.wanted = [rows.float() @ weight.float().T for weight in weights]
        self.size = max(sum(float(y.square().sum()) for y in self.wanted), torch.finfo(torch.float32).tiny)

    def of(self, weights: Sequence[Tensor], rows: Tensor) -> float:
        """``sum ||Q(rows) Q(weight)^T - wanted||^2 / sum ||wanted||^2`` with these weights and rows."""
        return output_error(self.linears, weights, rows, self.wanted) / self.size


def output_error(
    linears: Sequence[AnnotatedLinear], weights: Sequence[Tensor], rows: Tensor, wanted: Sequence[Tensor]
) -> float:
    """Squared error of the quantized linears' products ``Q(rows) Q(weight)^T``.

    Args:
        linears: with their observers, by which weights and inputs are quantized.
        weights: as they would be, ``(out_features, in_features)``.
        rows: of their common input, as it would be, ``(rows, in_features)``.
        wanted: what the products should be, float32.
    """
    quantized: dict[MakeObserver | None, Tensor] = {None: rows.float()}
    total = 0.0
    for linear, weight, output in zip(linears, weights, wanted, strict=True):
        observer = linear.input_observer
        if observer is not None and observer not in quantized:
            quantized[observer] = fake_quantized(observer, rows).float()
        rounded = fake_quantized(linear.weight_observer, weight, rows).float()
        total += float((F.linear(quantized[observer], rounded) - output).square().sum())
    return total


def fake_quantized(make: MakeObserver, x: Tensor, inputs: Tensor | None = None) -> Tensor:
    """``x`` as the observer that ``make`` makes quantizes it; ``inputs`` decide between formats, where it has a choice."""
    observer = make()
    if inputs is not None and not getattr(observer, "resolved", True):
        observer.resolve(x, inputs.float().T @ inputs.float())
    observer(x)  # a static range is observed first
    observer.fake_quantize = True
    rounded: Tensor = observer(x)
    return rounded
