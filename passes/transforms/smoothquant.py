"""SmoothQuant: difficulty moved from the channels of a linear's input into its weight, where it is easier to quantize."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer
from tqdm import tqdm  # type: ignore[import-untyped]

from fp4dit_ao import _compat
from fp4dit_ao.passes.transforms.annotated_linears import AnnotatedLinear, annotated_linears, linear_name, weight_path
from fp4dit_ao.passes.transforms.folding import foldable_parameters
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform, Record
from fp4dit_ao.passes.transforms.input_statistics import InputStatistics, input_statistics
from fp4dit_ao.passes.transforms.scaled_linear import INPUT_SCALE, ScaledLinear

_ATEN = torch.ops.aten
_BLOCK = re.compile(r"(?:.*?\.)??\d+(?=\.)")
"""The outermost numbered module in a name: the transformer block."""
_RANGE = 2.0**-13
"""Smallest absmax of a channel, as a part of the largest, that a factor follows: dead channels would give any factor."""


@dataclass
class _Group:
    """Linears that read the same tensor in one transformer block, or share a weight: they have one vector of factors."""

    linears: list[AnnotatedLinear]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def sources(self) -> list[Node]:
        return list(dict.fromkeys(linear.source for linear in self.linears))

    @property
    def pattern(self) -> str:
        """The name of the group in whatever block."""
        return re.sub(r"\d+", "*", self.names[0])


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

    @property
    def scale_name(self) -> str:
        return f"{self.linears[0]}.{INPUT_SCALE}"


class SmoothQuant(GraphTransform):
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

    Attributes:
        groups: what became of which linears; those that are best left alone are in none.
        errors: by the name of the first linear of a group, the squared output error before and after, as parts of
            ``||X W^T||^2``.

    Raises:
        ValueError: fewer than one point or row.
    """

    name: ClassVar[str] = "smoothquant"
    needs_data: ClassVar[bool] = True

    def __init__(self, quantizer: Quantizer | None = None, points: int = 20, rows: int = 512, fold: bool = False):
        if points < 1 or rows < 1:
            raise ValueError(f"SmoothQuant: points={points} and rows={rows}; both must be at least 1")
        self.quantizer, self.points, self.rows, self.fold = quantizer, points, rows, fold
        self.groups: list[SmoothedGroup] = []
        self.errors: dict[str, tuple[float, float]] = {}

    # --- learning ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, Any]]) -> None:
        """Choose factors for every linear that the quantizer quantizes.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that is smoothed already.
        """
        if self.quantizer is None:
            raise ValueError("SmoothQuant needs to know the formats; give SmoothQuant(quantizer) an FP4DiTQuantizer")
        groups = _groups(graph, annotated_linears(graph, self.quantizer))
        smoothed = next((name for name, _ in graph.named_buffers() if name.rpartition(".")[2] == INPUT_SCALE), None)
        if smoothed is not None:
            raise ValueError(f"this graph is smoothed already: it has {smoothed}; apply smoothquant once")
        nodes = [source for group in groups for source in group.sources]
        seen = input_statistics(graph, samples, nodes, self.rows, self.progress)
        self.groups, self.errors = [], {}
        for group in tqdm(groups, desc="smoothquant", unit="input", disable=not self.progress):
            scale = self._search(graph, group, [seen[source] for source in group.sources])
            folded = foldable_parameters(graph, group.sources[0], _nodes(group)) if self._may_fold(group) else []
            self.groups.append(SmoothedGroup(group.names, folded, scale))
        self._leave_alone([group.pattern for group in groups])

    def _may_fold(self, group: _Group) -> bool:
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

    def _search(self, graph: GraphModule, group: _Group, seen: list[InputStatistics]) -> Tensor:
        """The factors that the input is multiplied by, ``(in_features,)``."""
        rows = torch.cat([x for statistics in seen for x in statistics.kept])
        inputs = torch.stack([statistics.absmax for statistics in seen if statistics.absmax is not None]).amax(0)
        members = {linear.name: linear for linear in group.linears}
        weights = [_tensor(graph, linear.weight) for linear in members.values()]
        columns = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
        outputs = [rows.float() @ weight.float().T for weight in weights]
        size = max(sum(float(y.square().sum()) for y in outputs), torch.finfo(torch.float32).tiny)
        best: tuple[float, Tensor] | None = None
        first = float("nan")
        for scale in candidate_scales(inputs, columns, self.points):
            scale = scale.to(rows.dtype)
            error = _output_error(list(members.values()), weights, rows, outputs, scale) / size
            if best is None:
                first = error
            if best is None or error < best[0]:
                best = (error, scale)
        assert best is not None
        self.errors[group.names[0]] = (first, best[0])
        return best[1]

    # --- applying ----------------------------------------------------------------------------------------------------

    def rewrite(self, graph: GraphModule) -> None:
        linears: dict[str, list[Node]] = {}
        for node in graph.graph.nodes:
            if node.target is _ATEN.linear.default:
                linears.setdefault(linear_name(node), []).append(node)
        for group in self.groups:
            nodes = [node for name in group.linears for node in linears.get(name, [])]
            missing = next((name for name in group.linears if name not in linears), None)
            if missing is not None:
                raise ValueError(f"the graph has no linear {missing}, which was smoothed; it is of another model")
            if group.scale is not None:
                for path in dict.fromkeys(weight_path(node) for node in nodes):
                    _replace(graph, path, _tensor(graph, path).float() / group.scale.float())
                for path in group.folded:
                    old = _tensor(graph, path)
                    _replace(graph, path, old.float() * group.scale.float().reshape(-1, *[1] * (old.ndim - 1)))
            if not group.folded:
                _multiply(graph, nodes, group)

    def apply_to_modules(self, model: nn.Module) -> None:
        for group in self.groups:
            scale: Tensor | None = None
            for name in [] if group.folded else group.linears:
                parent, _, leaf = name.rpartition(".")
                linear = _submodule(model, name)
                if not isinstance(linear, nn.Linear):
                    raise ValueError(f"{type(model).__name__} has no linear {name}, which was smoothed")
                first = scale is None
                if scale is None:
                    weight = linear.weight
                    scale = torch.ones(linear.in_features, dtype=weight.dtype, device=weight.device)
                setattr(model.get_submodule(parent), leaf, ScaledLinear(linear, scale, stored=first))

    @property
    def changes(self) -> bool:
        return bool(self.groups)

    def shared_tensors(self) -> dict[str, str]:
        return {
            f"{name}.{INPUT_SCALE}": group.scale_name
            for group in self.groups
            if not group.folded
            for name in group.linears[1:]
        }

    def input_scales(self) -> dict[str, str]:
        return {name: group.scale_name for group in self.groups if not group.folded for name in group.linears}

    def folded_linears(self) -> list[str]:
        folded = [group for group in self.groups if group.folded]
        inputs = [name for group in folded for name in group.linears]
        return inputs + [name.rpartition(".")[0] for group in folded for name in group.folded]

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        owner = name.rpartition(".")[0]
        for group in self.groups:
            if name in group.folded or (group.folded and owner in group.linears):
                return None
            if owner in group.linears and name.endswith(".weight"):
                weight = weight / _tensor(graph, group.scale_name).to(weight.device, weight.dtype)
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
    x, w = (a.clamp(min=max(float(a.max()) * _RANGE, torch.finfo(torch.float32).tiny)) for a in (inputs, columns))
    for index in range(1, points + 1):
        alpha = index / points
        for beta in dict.fromkeys((0.0, 1 - alpha)):
            log = beta * w.log2() - alpha * x.log2()
            yield torch.exp2(log - log.mean()).to(torch.bfloat16).float()


def _output_error(
    linears: list[AnnotatedLinear], weights: list[Tensor], rows: Tensor, outputs: list[Tensor], scale: Tensor
) -> float:
    """Squared error of the quantized linears' outputs on ``rows``, if the input is multiplied by ``scale``."""
    scaled = rows * scale
    quantized: dict[Any, Tensor] = {None: scaled.float()}
    total = 0.0
    for linear, weight, output in zip(linears, weights, outputs, strict=True):
        observer = linear.input_observer
        if observer not in quantized:
            quantized[observer] = _fake_quantized(observer, scaled).float()
        scaled_weight = (weight.float() / scale.float()).to(weight.dtype)
        rounded = _fake_quantized(linear.weight_observer, scaled_weight, scaled).float()
        total += float((F.linear(quantized[observer], rounded) - output).square().sum())
    return total


def _fake_quantized(make: Any, x: Tensor, inputs: Tensor | None = None) -> Tensor:
    """``x`` as the observer that ``make`` makes quantizes it; ``inputs`` decide between formats, where it has a choice."""
    observer = make()
    if inputs is not None and not getattr(observer, "resolved", True):
        observer.resolve(x, inputs.float().T @ inputs.float())
    observer(x)  # a static range is observed first
    observer.fake_quantize = True
    rounded: Tensor = observer(x)
    return rounded


def _groups(graph: GraphModule, linears: list[AnnotatedLinear]) -> list[_Group]:
    """Linears by what their factors must agree with, in the order of the graph; without those whose factors cannot be said."""
    tensors = [x for _, x in graph.named_parameters(remove_duplicate=False)]
    groups: list[_Group] = []
    by_key: dict[Any, _Group] = {}
    for linear in linears:
        weight = _tensor(graph, linear.weight)
        fits = linear.source.meta["val"].dtype == weight.dtype and weight.is_floating_point()
        if not linear.name or not fits or sum(x is weight for x in tensors) > 1:
            continue
        block = _BLOCK.match(linear.name)
        keys = [(linear.source, block and block.group()), linear.weight]
        found = list({id(by_key[key]): by_key[key] for key in keys if key in by_key}.values())
        group = found[0] if found else _Group([])
        if not found:
            groups.append(group)
        for other in found[1:]:
            group.linears += other.linears
            groups = [kept for kept in groups if kept is not other]
            by_key = {key: group if value is other else value for key, value in by_key.items()}
        group.linears.append(linear)
        by_key.update(dict.fromkeys(keys, group))
    return groups


def _nodes(group: _Group) -> list[Node]:
    return [linear.node for linear in group.linears]


def _is_identity(scale: Tensor | None) -> bool:
    return scale is not None and bool((scale == 1).all())


def _multiply(graph: GraphModule, nodes: list[Node], group: SmoothedGroup) -> None:
    """Put ``mul(source, smooth_scale)`` before the linears of a group."""
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    path: str | None = None
    for source in dict.fromkeys(node.args[0] for node in sorted(nodes, key=order.__getitem__)):
        assert isinstance(source, Node)
        readers = sorted((node for node in nodes if node.args[0] is source), key=order.__getitem__)
        value = source.meta["val"]
        with graph.graph.inserting_before(readers[0]):
            if path is None:
                scale = group.scale
                if scale is None:
                    weight = _tensor(graph, weight_path(readers[0]))
                    scale = torch.ones(value.shape[-1], dtype=value.dtype, device=weight.device)
                factor = _compat.create_buffer_node(graph, group.scale_name, scale)
                path = str(factor.target)
                if path != group.scale_name:
                    raise ValueError(f"{group.linears[0]} has a tensor {INPUT_SCALE} already; apply smoothquant once")
            else:
                factor = graph.graph.get_attr(path)
            scaled = graph.graph.call_function(_ATEN.mul.Tensor, (source, factor))
        factor.meta = {k: v for k, v in readers[0].meta.items() if k in ("nn_module_stack", "stack_trace")}
        factor.meta["val"] = value.new_empty(value.shape[-1:])
        scaled.meta = dict(readers[0].meta) | {"val": value}
        for node in readers:
            node.update_arg(0, scaled)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _tensor(graph: GraphModule, path: str) -> Tensor:
    owner, _, leaf = path.rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(owner), leaf)
    return tensor


def _replace(graph: GraphModule, path: str, value: Tensor) -> None:
    """Give the graph another parameter of that name: the old one may be that of the model that was captured."""
    owner, _, leaf = path.rpartition(".")
    old = _tensor(graph, path)
    setattr(graph.get_submodule(owner), leaf, nn.Parameter(value.to(old.dtype), old.requires_grad))
