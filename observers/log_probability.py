"""The observer of attention's probabilities: rounded online to powers of two of the largest (DGQ, arXiv 2501.04304)."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fp4dit_ao.observers.activation import ActivationObserver
from fp4dit_ao.observers.base import StraightThrough, replace_observer
from fp4dit_ao.ops.log_probability import log2_round


class LogProbabilityObserver(ActivationObserver):
    """Nothing to calibrate; ``convert`` emits ``fp4dit_ao.log2_round``.

    Args:
        bits: of a code.
        keep_first: whether the first key's column, a text's start token, stays as it is.
        name: of the attention, for messages.
        collect_gram: not asked for.
    """

    def __init__(
        self, bits: int, keep_first: bool, name: str = "probabilities", collect_gram: bool = False, **spec: object
    ):
        super().__init__(f"e{bits}m0", name, collect_gram, **spec)  # the nearest format of integers, for reports
        self.bits, self.keep_first = bits, keep_first

    def block_size(self, x: Tensor) -> list[int]:
        return [1] + [-1] * (x.ndim - 1)

    def _fake_quantize(self, x: Tensor) -> Tensor:
        rounded = log2_round(x, self.bits, self.keep_first)
        return StraightThrough.apply(x, rounded) if x.requires_grad else rounded  # type: ignore[no-untyped-call, no-any-return]

    def convert(self, model: GraphModule, observer_node: Node) -> None:
        arguments = (observer_node.args[0], self.bits, self.keep_first)
        with model.graph.inserting_before(observer_node):
            new = model.graph.call_function(torch.ops.fp4dit_ao.log2_round.default, arguments)
        replace_observer(model, observer_node, new)
