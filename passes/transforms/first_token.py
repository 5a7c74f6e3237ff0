"""The text's first token apart: what linears make of it in high precision, only what differs from it quantized (MixDQ)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao._compat import Operator
from fp4dit_ao.passes.transforms.annotated_linears import weight_path
from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.input_statistics import InputStatistics
from fp4dit_ao.passes.transforms.input_transform import InputTransform
from fp4dit_ao.passes.transforms.linear_groups import (
    call,
    calls_of,
    groups_by_input,
    module_of,
    nodes_by_linear,
    readers_by_source,
    stored_tensor,
    tensor_at,
)
from fp4dit_ao.passes.transforms.transformed_linear import TransformedLinear

TOKEN, OUTPUT = "first_token", "first_token_output"
"""Names of the token ``(in_features,)`` and its product with the weight ``(out_features,)``, beside ``weight`` and ``bias``."""
SAME = 2.0**-5
"""Most that one token's elements may differ from call to call to be the same, as a part of its largest: noise of bfloat16."""
_ATEN = torch.ops.aten
_END = 2**63 - 1


class TokenStatistics(InputStatistics):
    """Also the extremes of the first and the second token over all rows of all samples, if there are two in each.

    Attributes:
        low, high: float32 ``(2, channels)``; None for a tensor that is not ``(rows, tokens, channels)``.
    """

    def __init__(self, rows: int):
        super().__init__(rows)
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        first = not self.kept
        super().update(x)
        if x.ndim != 3 or x.shape[1] < 2 or not (first or self.low is not None):
            self.low = self.high = None
            return
        tokens = x[:, :2].detach().float()
        low, high = tokens.amin(0), tokens.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def constant(self) -> Tensor | None:
        """The first token, float32 ``(channels,)``, if it is the same in all rows and the second is not; else None."""
        if self.low is None or self.high is None:
            return None
        largest = torch.maximum(self.low.abs(), self.high.abs()).amax(-1)
        first, second = ((self.high - self.low).amax(-1) <= SAME * largest).tolist()
        return (self.low[0] + self.high[0]) / 2 if first and not second and largest[0] > 0 else None


@dataclass
class FirstTokenGroup:
    """Linears that share an input.

    Attributes:
        linears: their names; ``first_token`` is the first one's, ``first_token_output`` each one's own.
        token: ``(in_features,)``; None in a transform from a record.
        outputs: ``(out_features,)`` of each linear.
    """

    linears: list[str]
    token: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)


class FirstToken(InputTransform):
    """Takes a constant first token out of inputs before they are quantized, and adds what its float weight makes of it.

    ``y_0 = W c + Q(x_0 - c) Q(W)^T + b`` for the first token x_0, with c the one that all calibration samples have; the other
    tokens go as they were. A text encoder that looks backwards alone (CLIP, and language models such as Gemma) makes the same
    of its first token whatever the text is, often far larger than all others. Its key and value then are constants: nothing of
    them is quantized, and a static range or a tensor's scale is that of the other tokens.

    Source: MixDQ (arXiv 2405.17873), section 4.1, which leaves the token out of the cross-attention's linears and puts a
    stored row in its place. Subtracting it instead computes the same where it is constant, and is right where it is not, as
    for another text encoder. Bidirectional encoders (T5) have no such token; there, nothing is changed. Samples of two
    different prompts are needed, by which the token is told from the text.

    Args:
        quantizer: says which linears are quantized.
    """

    name: ClassVar[str] = "first_token"
    leaf: ClassVar[str] = TOKEN
    done: ClassVar[str] = "given its first token's output"
    fits_single_file: ClassVar[bool] = False
    statistics: ClassVar[type[InputStatistics]] = TokenStatistics
    groups: list[FirstTokenGroup]

    def __init__(self, quantizer: Quantizer | None = None):
        super().__init__(quantizer, rows=1)
        self.groups = []

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Find the linears whose input begins with a constant token.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that was changed already.
        """
        linears = self.unchanged_linears(graph)
        self.groups = []
        for group, seen in self.observed(graph, groups_by_input(graph, linears), samples):
            tokens = [statistics.constant() for statistics in seen if isinstance(statistics, TokenStatistics)]
            if len(tokens) == 1 and tokens[0] is not None:
                weights = [tensor_at(graph, f"{name}.weight") for name in group.names]
                token = tokens[0].to(weights[0].dtype)
                outputs = [(weight.float() @ token.float()).to(weight.dtype) for weight in weights]
                self.groups.append(FirstTokenGroup(group.names, token, outputs))

    def rewrite(self, graph: GraphModule) -> None:
        linears = nodes_by_linear(graph)
        for group in self.groups:
            nodes = calls_of(linears, group.linears, self.done)
            token, outputs = _tensors(group, {name: tensor_at(graph, f"{name}.weight") for name in group.linears})
            for source, readers in readers_by_source(graph, nodes):
                with graph.graph.inserting_before(readers[0]):
                    stored = stored_tensor(graph, readers[0], self.shared_name(group), token)
                    changed = _on_first_token(graph, readers[0], _ATEN.sub.Tensor, source, stored)
                for node in readers:
                    node.update_arg(0, changed)
                    _add_output(graph, node, outputs[weight_path(node).removesuffix(".weight")])

    def apply_to_modules(self, model: nn.Module) -> None:
        for group in self.groups:
            linears = {name: module_of(model, name, self.done) for name in group.linears}
            token, outputs = _tensors(
                FirstTokenGroup(group.linears), {name: linear.weight for name, linear in linears.items()}
            )
            for name, linear in linears.items():
                stored = {TOKEN: name == group.linears[0], OUTPUT: True}
                tensors = {TOKEN: token, OUTPUT: outputs[name]}
                model.set_submodule(name, TransformedLinear(linear, _Apart(), tensors, stored))

    def refused_loras(self) -> dict[str, str]:
        """Every changed linear: a fused LoRA would not see the token."""
        why = f"whose input lacks its first token; quantize without the transform {self.name!r} to use it"
        return {name: why for group in self.groups for name in group.linears}

    def to_record(self) -> Record:
        return {"groups": [list(group.linears) for group in self.groups]}

    @classmethod
    def from_record(cls, record: Record) -> Self:
        transform = cls()
        transform.groups = [FirstTokenGroup([str(name) for name in names]) for names in record["groups"]]
        if not all(group.linears for group in transform.groups):
            raise ValueError("a group of linears with a first token is empty")
        return transform


class _Apart:
    """The module form."""

    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] - getattr(module, TOKEN), x[:, 1:]], 1)

    def beside(self, module: nn.Module, x: Tensor) -> Tensor:
        return F.pad(getattr(module, OUTPUT)[None, None], (0, 0, 0, x.shape[1] - 1))

    def undone(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight


def _tensors(group: FirstTokenGroup, weights: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The token and its outputs; zeros in a transform from a record, until stored tensors take their places."""
    if group.token is not None:
        return group.token, dict(zip(group.linears, group.outputs, strict=True))
    return weights[group.linears[0]].new_zeros(weights[group.linears[0]].shape[1]), {
        name: weight.new_zeros(weight.shape[0]) for name, weight in weights.items()
    }


def _on_first_token(graph: GraphModule, like: Node, change: Operator, x: Node, by: Node) -> Node:
    """``x`` ``(rows, tokens, channels)`` with ``change(first token, by)``, at the current insertion point."""
    value: Tensor = x.meta["val"]
    first = call(graph, like, _ATEN.slice.Tensor, (x, 1, 0, 1), value[:, :1])
    rest = call(graph, like, _ATEN.slice.Tensor, (x, 1, 1, _END), value[:, 1:])
    changed = call(graph, like, change, (first, by), value[:, :1])
    return call(graph, like, _ATEN.cat.default, ([changed, rest], 1), value)


def _add_output(graph: GraphModule, node: Node, output: Tensor) -> None:
    """Add the token's output to that of a linear's node."""
    path = f"{weight_path(node).removesuffix('.weight')}.{OUTPUT}"
    before = set(node.users)
    with graph.graph.inserting_after(node):
        stored = stored_tensor(graph, node, path, output)
    with graph.graph.inserting_before(stored.next):
        total = _on_first_token(graph, node, _ATEN.add.Tensor, node, stored)
    node.replace_all_uses_with(total, delete_user_cb=before.__contains__)
