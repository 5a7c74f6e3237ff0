"""SmoothQuant: difficulty moved from the channels of a linear's input into its weight, where it is easier to quantize."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.annotated_linears import weight_path
from fp4dit_ao.passes.transforms.folding import foldable_parameters
from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.input_statistics import InputStatistics, kept_rows
from fp4dit_ao.passes.transforms.input_transform import InputTransform
from fp4dit_ao.passes.transforms.linear_groups import (
    LinearGroup,
    call,
    calls_of,
    groups_by_input,
    module_of,
    nodes_by_linear,
    readers_by_source,
    replace_parameter,
    stored_tensor,
    tensor_at,
)
from fp4dit_ao.passes.transforms.scaled_linear import INPUT_SCALE, ScaledLinear
from fp4dit_ao.passes.transforms.trial_quantization import OutputError

_ATEN = torch.ops.aten
_RANGE = 2.0**-13
"""Smallest absmax of a channel, as a part of the largest, that a factor follows: dead channels would give any factor."""


@dataclass
class SmoothedGroup:
    """What became of the linears that share an input.

    Attributes:
        linears: their names; the first one's ``smooth_scale`` is the factors that the input is multiplied by.
        folded: parameters that were multiplied instead, along dimension 0; none if the graph multiplies.
        scale: ``(in_features,)``; None in a transform from a record.
    """

    linears: list[str]
    folded: list[str] = field(default_factory=list)
    scale: Tensor | None = None


class SmoothQuant(InputTransform):
    """Divides the channels of linears' inputs by factors ``t``, and multiplies the columns of their weights by them.

    ``t_j = max|X_j|^a / max|W_j|^b`` (SmoothQuant, arXiv 2211.10438, eq. 4, where b = 1 - a), over the grid of SVDQuant
    (arXiv 2411.05007): ``(a, 0)`` and ``(a, 1 - a)``, a = 1/n, 2/n, …, 1, and no smoothing. Each linear takes the factors whose
    output error ``||X W^T - Q(X / t) Q(W t)^T||^2``, with weights and inputs quantized by the quantizer's own observers, is the
    smallest on rows of the calibration data: on these it is never worse than without. Linears that share an input (q, k and v)
    are one linear with their rows joined. ``1 / t`` is rounded to bfloat16: it is the same number in every type of model.

    A node before the linear multiplies its input by ``1 / t``. Compilers fuse it into the input's quantization, and LoRAs of
    the float model stay right. With ``fold``, the factors go into the parameters that the input comes from where that is exact
    (the affine weights of a norm, or the rows of the value projection before an output projection). No operation remains then,
    but the input of the linear is another one than the float model's, so that a LoRA of the float model on these layers
    would be wrong.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        points: n, points on each of the two lines of the grid.
        rows: of each input, kept to measure output errors on; their number times channels is the memory a linear takes.
        fold: whether factors are folded into other parameters where they can be.

    Raises:
        ValueError: fewer than one point or row.
    """

    name: ClassVar[str] = "smoothquant"
    leaf: ClassVar[str] = INPUT_SCALE
    done: ClassVar[str] = "smoothed"
    groups: list[SmoothedGroup]

    def __init__(self, quantizer: Quantizer | None = None, points: int = 20, rows: int = 512, fold: bool = False):
        super().__init__(quantizer, rows)
        if points < 1:
            raise ValueError(f"SmoothQuant: points={points}; it must be at least 1")
        self.points, self.fold, self.groups = points, fold, []

    # --- learning ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Choose factors for every linear that the quantizer quantizes.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that is smoothed already.
        """
        groups = groups_by_input(graph, self.linears_to_change(graph))
        self.groups = []
        for group, seen in self.observed(graph, groups, samples):
            scale = self._search(graph, group, seen)
            folded = foldable_parameters(graph, group.sources[0], _nodes(group)) if self._may_fold(group) else []
            self.groups.append(SmoothedGroup(group.names, folded, scale))
        self._leave_alone([group.pattern for group in groups])

    def _may_fold(self, group: LinearGroup) -> bool:
        return self.fold and len(group.sources) == 1

    def _leave_alone(self, patterns: list[str]) -> None:
        """Drop groups without factors; a multiplication by ones stays where other blocks have one, so that blocks are alike."""
        changed = {
            pattern for pattern, group in zip(patterns, self.groups, strict=True) if not _is_identity(group.scale)
        }
        self.groups = [
            group
            for pattern, group in zip(patterns, self.groups, strict=True)
            if pattern in changed and not (group.folded and _is_identity(group.scale))
        ]

    def _search(self, graph: GraphModule, group: LinearGroup, seen: list[InputStatistics]) -> Tensor:
        """The factors that the input is multiplied by, ``(in_features,)``."""
        rows = kept_rows(seen)
        weights = [tensor_at(graph, linear.weight) for linear in group.members]
        columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
        error = OutputError(group.members, weights, rows)
        best: tuple[float, Tensor] | None = None
        first = float("nan")
        for scale in self.candidates(seen, columns):
            scale = scale.to(rows.dtype)
            scaled = [(weight.float() / scale.float()).to(weight.dtype) for weight in weights]
            found = error.of(scaled, rows * scale)
            if best is None:
                first = found
            if best is None or found < best[0]:
                best = (found, scale)
        assert best is not None
        self.errors[group.names[0]] = (first, best[0])
        return best[1]

    def candidates(self, seen: Sequence[InputStatistics], columns: Tensor) -> Iterator[Tensor]:
        """The factors to try, the identity first: float32 ``(in_features,)``.

        Args:
            seen: what was seen of the linears' input; several where one weight serves several inputs.
            columns: largest magnitude of every column of the weights, float32.
        """
        inputs = torch.stack([statistics.absmax for statistics in seen if statistics.absmax is not None]).amax(0)
        return candidate_scales(inputs, columns, self.points)

    # --- applying ----------------------------------------------------------------------------------------------------

    def rewrite(self, graph: GraphModule) -> None:
        linears = nodes_by_linear(graph)
        for group in self.groups:
            nodes = calls_of(linears, group.linears, self.done)
            if group.scale is not None:
                for path in dict.fromkeys(weight_path(node) for node in nodes):
                    replace_parameter(graph, path, tensor_at(graph, path).float() / group.scale.float())
                for path in group.folded:
                    old = tensor_at(graph, path)
                    replace_parameter(graph, path, old.float() * group.scale.float().reshape(-1, *[1] * (old.ndim - 1)))
            if not group.folded:
                _multiply(graph, nodes, self.shared_name(group), group.scale)

    def apply_to_modules(self, model: nn.Module) -> None:
        for group in self.groups:
            scale: Tensor | None = None
            for name in [] if group.folded else group.linears:
                linear = module_of(model, name, self.done)
                first = scale is None
                if scale is None:
                    weight = linear.weight
                    scale = torch.ones(linear.in_features, dtype=weight.dtype, device=weight.device)
                model.set_submodule(name, ScaledLinear(linear, scale, stored=first))

    def shared_tensors(self) -> dict[str, str]:
        multiplied = self.input_scales()
        return {own: shared for own, shared in super().shared_tensors().items() if own.rpartition(".")[0] in multiplied}

    def input_scales(self) -> dict[str, str]:
        return {name: self.shared_name(group) for group in self.groups if not group.folded for name in group.linears}

    def refused_loras(self) -> dict[str, str]:
        folded = [group for group in self.groups if group.folded]
        names = [name for group in folded for name in group.linears]
        names += [name.rpartition(".")[0] for group in folded for name in group.folded]
        why = "whose smoothing factors were folded into other layers' weights; quantize with SmoothQuant(fold=False) to use it"
        return dict.fromkeys(names, why)

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        owner = name.rpartition(".")[0]
        for group in self.groups:
            if name in group.folded or (group.folded and owner in group.linears):
                return None
            if owner in group.linears and name.endswith(".weight"):
                weight = weight / tensor_at(graph, self.shared_name(group)).to(weight.device, weight.dtype)
        return weight

    # --- records -----------------------------------------------------------------------------------------------------

    def to_record(self) -> Record:
        return {"groups": [{"linears": list(group.linears), "folded": list(group.folded)} for group in self.groups]}

    @classmethod
    def from_record(cls, record: Record) -> "SmoothQuant":
        transform = cls()
        transform.groups = [
            SmoothedGroup([str(name) for name in group["linears"]], [str(name) for name in group["folded"]])
            for group in record["groups"]
        ]
        if not all(group.linears for group in transform.groups):
            raise ValueError("a group of smoothed linears is empty")
        return transform


def candidate_scales(inputs: Tensor, columns: Tensor, points: int) -> Iterator[Tensor]:
    """``1 / t`` for every point of the grid, the identity first; float32 ``(in_features,)``, of geometric mean near 1.

    Args:
        inputs: largest magnitude of every input channel, float32.
        columns: that of every column of the weight.
        points: on each of the two lines of the grid.
    """
    yield torch.ones_like(inputs)
    for index in range(1, points + 1):
        alpha = index / points
        for beta in dict.fromkeys((0.0, 1 - alpha)):
            yield balancing_scale(inputs, columns, alpha, beta)


def balancing_scale(inputs: Tensor, columns: Tensor, alpha: float, beta: float) -> Tensor:
    """``1 / t = columns^beta / inputs^alpha``, rounded to bfloat16, of geometric mean near 1; float32 ``(in_features,)``."""
    x, w = (a.clamp(min=max(float(a.max()) * _RANGE, torch.finfo(torch.float32).tiny)) for a in (inputs, columns))
    log = beta * w.log2() - alpha * x.log2()
    return torch.exp2(log - log.mean()).to(torch.bfloat16).float()


def _nodes(group: LinearGroup) -> list[Node]:
    return [linear.node for linear in group.linears]


def _is_identity(scale: Tensor | None) -> bool:
    return scale is not None and bool((scale == 1).all())


def _multiply(graph: GraphModule, nodes: list[Node], name: str, scale: Tensor | None) -> None:
    """Put a multiplication by the tensor ``name`` before the linears of a group; it holds ``scale``, or ones for now."""
    if any(other == name for other, _ in graph.named_buffers()):
        raise ValueError(f"this graph has a tensor {name} already; apply smoothquant once")
    for source, readers in readers_by_source(graph, nodes):
        value: Tensor = source.meta["val"]
        if scale is None:
            weight = tensor_at(graph, weight_path(readers[0]))
            scale = torch.ones(weight.shape[1], dtype=value.dtype, device=weight.device)
        with graph.graph.inserting_before(readers[0]):
            factor = stored_tensor(graph, readers[0], name, scale)
            scaled = call(graph, readers[0], _ATEN.mul.Tensor, (source, factor), value)
        for node in readers:
            node.update_arg(0, scaled)
