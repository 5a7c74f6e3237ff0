"""Outlier groups: input channels of a linear put in an order in which those of like size share a scale."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.input_statistics import InputStatistics, kept_rows
from fp4dit_ao.passes.transforms.linear_groups import (
    LinearGroup,
    call,
    groups_by_input,
    tensor_at,
)
from fp4dit_ao.passes.transforms.online_transform import OnlineTransform
from fp4dit_ao.passes.transforms.transformed_linear import TransformedLinear
from fp4dit_ao.passes.transforms.trial_quantization import OutputError

ORDER = "channel_order"
"""Name of the order, int64 ``(in_features,)``: the channel of the float input at each place."""
LEAST_GAIN = 0.01
"""Part of the squared error that an order must save, to be worth a gather: sums in another order differ by rounding."""
_ATEN = torch.ops.aten


@dataclass
class OrderedGroup:
    """Linears that share a reordered input.

    Attributes:
        linears: their names; the order is the first one's ``channel_order``.
        order: None in a transform from a record.
    """

    linears: list[str]
    order: Tensor | None = None


class OutlierGroups(OnlineTransform[OrderedGroup]):
    """Reorders a linear's input channels, and the columns of its weight, so that channels of like size lie in one block.

    Source: DGQ (arXiv 2501.04304), whose clusters of channels, by K-means on their ranges, have a scale each. Such scales stand
    inside of a product's sum, where hardware has room for blocks of consecutive channels alone. So clusters are blocks here:
    channels are sorted, by the largest magnitudes of the input, of the weight's columns, or of both multiplied, whichever errs
    least at the output in the quantizer's own formats on rows of the calibration data, or left as they are. (Ranges of
    symmetric formats are one number, and sorting is the clustering of numbers into sets of a given size.) One order serves all
    timesteps. Linears at one place of all blocks are reordered if their errors sum to less, so that all blocks keep one
    structure.

    It helps where scales are shared by blocks of channels: of weights (groups), and of inputs, too, in NVFP4 and MXFP4. One
    scale for each token or row is the same in any order.

    It costs a gather before the linear. Linears whose input joins tensors are left to ``split_inputs``.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        rows: of each input, kept to measure output errors on.

    Raises:
        ValueError: fewer than one row.
    """

    name: ClassVar[str] = "outlier_groups"
    leaf: ClassVar[str] = ORDER
    done: ClassVar[str] = "reordered"

    def __init__(self, quantizer: Quantizer | None = None, rows: int = 512):
        super().__init__(quantizer, rows)

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Choose an order for every linear that the quantizer quantizes.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that is reordered already.
        """
        linears = self.whole_linears(graph)
        groups = groups_by_input(graph, linears)
        found = {}
        for group, seen in self.observed(graph, groups, samples):
            found[group.names[0]] = OrderedGroup(group.names, self._search(graph, group, seen))
        chosen = self.gaining(groups)
        self.groups = [found[group.names[0]] for group in groups if group.pattern in chosen]
        self.fitted = True

    def _search(self, graph: GraphModule, group: LinearGroup, seen: list[InputStatistics]) -> Tensor:
        rows, weights = kept_rows(seen), [tensor_at(graph, linear.weight) for linear in group.members]
        inputs = torch.stack([statistics.absmax for statistics in seen if statistics.absmax is not None]).amax(0)
        columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
        error = OutputError(group.members, weights, rows)
        tried = [
            (error.of([weight[:, order] for weight in weights], rows[:, order]), order)
            for order in candidate_orders(inputs, columns)
        ]
        first, best = tried[0], min(tried, key=lambda each: each[0])
        if best[0] > (1 - LEAST_GAIN) * first[0]:
            best = first
        self.errors[group.names[0]] = (first[0], best[0])
        return best[1]

    # --- what is changed ---------------------------------------------------------------------------------------------

    def shared_value(self, group: OrderedGroup, like: Tensor) -> Tensor:
        return torch.arange(like.shape[1], device=like.device) if group.order is None else group.order.to(like.device)

    def changed_weight(self, weight: Tensor, shared: Tensor) -> Tensor:
        return weight[:, shared]

    def changed_input(self, graph: GraphModule, reader: Node, source: Node, shared: Node, group: OrderedGroup) -> Node:
        return call(graph, reader, _ATEN.index_select.default, (source, -1, shared), source.meta["val"])

    def changed_module(self, linear: nn.Linear, shared: Tensor, stored: bool) -> nn.Module:
        return ReorderedLinear(linear, shared, stored)

    # --- records -----------------------------------------------------------------------------------------------------

    def to_record(self) -> Record:
        return {"groups": [{"linears": list(group.linears)} for group in self.groups]}

    @classmethod
    def from_record(cls, record: Record) -> "OutlierGroups":
        transform = cls()
        transform.groups = [OrderedGroup([str(name) for name in group["linears"]]) for group in record["groups"]]
        if not all(group.linears for group in transform.groups):
            raise ValueError("a group of reordered linears is empty")
        return transform


def candidate_orders(inputs: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """The channels as they are, and sorted by size in three ways; int64 ``(in_features,)``.

    Args:
        inputs: largest magnitude of every input channel, float32.
        columns: that of every column of the weight.
    """
    yield torch.arange(len(inputs), device=inputs.device)
    for size in (inputs, columns, inputs * columns):
        yield size.argsort(descending=True, stable=True)


class _Reordering:
    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        return torch.index_select(x, -1, getattr(module, ORDER))

    def beside(self, module: nn.Module, x: Tensor) -> None:
        return None

    def undone(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight[:, getattr(module, ORDER).argsort()]


class ReorderedLinear(TransformedLinear):
    """``linear(x[..., order])``.

    Args:
        linear: that it replaces; its parameters are shared.
        order: int64 ``(in_features,)``.
        stored: whether the order is one of the model's own tensors, rather than that of another linear with the same input.
    """

    def __init__(self, linear: nn.Linear, order: Tensor, stored: bool = True):
        super().__init__(linear, _Reordering(), {ORDER: order}, {ORDER: stored})
