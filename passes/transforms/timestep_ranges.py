"""Static ranges of linears' inputs for every timestep (TFMQ-DM), as a division before the linear and a product behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao import _compat
from fp4dit_ao.observers import StaticActivationObserver
from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.input_transform import InputTransform
from fp4dit_ao.passes.transforms.linear_groups import (
    call,
    calls_of,
    groups_by_input,
    nodes_by_linear,
    readers_by_source,
    stored_tensor,
)
from fp4dit_ao.passes.transforms.split_inputs import joins_or_is_part

RANGES = "timestep_ranges"
"""Name of the table ``(timesteps,)`` that an input is divided by an entry of, beside ``weight`` and ``bias``."""
TIMES = "calibrated_timesteps"
"""Name of the graph's table of timesteps, float32 ``(timesteps,)``, ascending."""
ARGUMENTS = ("timestep", "timesteps", "t")
"""Names of the argument of ``forward`` that says which timestep it is."""
_RANGE = 2.0**-10
"""Smallest range, as a part of the largest."""
_ATEN = torch.ops.aten


@dataclass
class RangedGroup:
    """Linears that share an input.

    Attributes:
        linears: their names; the table is the first one's ``timestep_ranges``.
        ranges: ``(timesteps,)``; None in a transform from a record.
    """

    linears: list[str]
    ranges: Tensor | None = None


class TimestepRanges(InputTransform):
    """Gives every timestep a static range of its own: ``r_t Q(X / r_t) W^T + b``, r_t the largest magnitude of X at t.

    Source: TFMQ-DM (arXiv 2311.16503), its finite-set calibration: sampling visits few timesteps, and each has its own ranges,
    from the extremes seen there. (In the paper that holds for layers that depend on the timestep alone; its code gives every
    quantizer a table, and so does this.) Dividing by ``r_t`` and quantizing with one scale ``s`` is quantizing with the scale
    ``s r_t``. At run time the nearest timestep of the calibration decides, row by row of the batch, so that other numbers of
    steps work, too. ``r_t`` is relative to the largest, and rounded to bfloat16: it is the same number in every type of model.

    It concerns inputs with a static range (``activation_granularity="tensor"``, recipe ``w4a6_static``); where tokens have a
    scale each, found online, it would change nothing, and is refused. q, k and v of attention keep one range. The paper's
    other half, which rounds the layers of the time embedding together, has no object here: every recipe leaves them in high
    precision.

    It costs a division before and a product behind each linear, and a look-up. The module form does not know the timestep:
    such models are graphs. Linears whose input joins tensors, or has another batch than the timestep, are left as they are.

    Args:
        quantizer: says which linears are quantized, and with which observers.

    Attributes:
        timesteps: those of the calibration data, ascending.
        argument: name of the argument that holds the timestep.
    """

    name: ClassVar[str] = "timestep_ranges"
    leaf: ClassVar[str] = RANGES
    done: ClassVar[str] = "given ranges by timestep"
    fits_single_file: ClassVar[bool] = False
    groups: list[RangedGroup]

    def __init__(self, quantizer: Quantizer | None = None):
        super().__init__(quantizer, rows=1)
        self.groups = []
        self.timesteps: list[float] = []
        self.argument = ""

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Find the ranges of every linear's input that has a static one.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit or name no timestep, a graph that has such ranges
                already, or a quantizer without static ranges.
        """
        static = [x for x in self.linears_to_change(graph) if _is_static(x.input_observer)]
        if not static:
            raise ValueError(
                "timestep_ranges is about inputs with a static range, and here none has one: tokens have scales of their own "
                "at every timestep; choose a recipe with static ranges, such as w4a6_static, or leave the transform out"
            )
        self.argument = _timestep_argument(samples)
        batch = _placeholder(graph, self.argument).meta["val"].shape
        linears = [x for x in static if not joins_or_is_part(x.node) and _same_batch(x.source, batch)]
        groups = groups_by_input(graph, linears)
        times = [float(_timestep_of(sample, self.argument)) for sample in samples]
        self.timesteps = sorted(set(times))
        place = torch.tensor([self.timesteps.index(time) for time in times])
        self.groups = []
        for group, seen in self.observed(graph, groups, samples):
            largest = torch.stack([torch.stack(x.by_sample).amax(1) for x in seen]).amax(0)  # of each sample
            ranges = torch.zeros(len(self.timesteps), device=largest.device)
            ranges.scatter_reduce_(0, place.to(largest.device), largest, "amax")
            ranges = (ranges / ranges.max().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(_RANGE)
            self.groups.append(
                RangedGroup(group.names, ranges.bfloat16().to(group.linears[0].source.meta["val"].dtype))
            )

    @property
    def changes(self) -> bool:
        return bool(self.groups)

    @torch.no_grad()
    def rewrite(self, graph: GraphModule) -> None:
        linears = nodes_by_linear(graph)
        index = self._index(graph)
        for group in self.groups:
            nodes = calls_of(linears, group.linears, self.done)
            for source, readers in readers_by_source(graph, nodes):
                value: Tensor = source.meta["val"]
                ranges = torch.ones(len(self.timesteps), dtype=value.dtype) if group.ranges is None else group.ranges
                rows, column = index.meta["val"].shape[0], [1] * (value.ndim - 1)
                with graph.graph.inserting_before(readers[0]):
                    table = stored_tensor(graph, readers[0], self.shared_name(group), ranges)
                    picked = call(
                        graph, readers[0], _ATEN.index_select.default, (table, 0, index), value.new_empty([rows])
                    )
                    range_ = call(
                        graph, readers[0], _ATEN.view.default, (picked, [-1, *column]), value.new_empty([rows, *column])
                    )
                    divided = call(graph, readers[0], _ATEN.div.Tensor, (source, range_), value)
                for node in readers:
                    _rescale(graph, node, divided, range_)

    def _index(self, graph: GraphModule) -> Node:
        """The place of each row's timestep in the table: int64 ``(batch,)``, or ``(1,)`` for one timestep without a batch."""
        timestep = _placeholder(graph, self.argument)
        value: Tensor = timestep.meta["val"]
        times = torch.tensor(self.timesteps, dtype=torch.float32)
        device = next((x.device for x in graph.parameters()), torch.device("cpu"))
        rows = list(value.shape) or [1]
        wide = value.new_empty([*rows, len(times)], dtype=torch.float32)
        with graph.graph.inserting_before(timestep.next):
            table = _compat.create_buffer_node(graph, TIMES, times.to(device))
            table.meta = {"val": value.new_empty(times.shape, dtype=torch.float32)}
            column = call(graph, timestep, _ATEN.reshape.default, (timestep, [-1, 1]), value.new_empty([*rows, 1]))
            apart = call(graph, timestep, _ATEN.sub.Tensor, (column, table), wide)
            distance = call(graph, timestep, _ATEN.abs.default, (apart,), wide)
            return call(graph, timestep, _ATEN.argmin.default, (distance, -1), value.new_empty(rows, dtype=torch.int64))

    def apply_to_modules(self, model: nn.Module) -> None:
        raise ValueError(
            f"{type(model).__name__} has input ranges by timestep, which its modules do not know; load it as a graph "
            "(fp4dit_ao.load_pipeline), or quantize without the transform 'timestep_ranges'"
        )

    # --- records -----------------------------------------------------------------------------------------------------

    def to_record(self) -> Record:
        return {
            "argument": self.argument,
            "timesteps": self.timesteps,
            "groups": [{"linears": list(group.linears)} for group in self.groups],
        }

    @classmethod
    def from_record(cls, record: Record) -> Self:
        transform = cls()
        transform.argument = str(record["argument"])
        transform.timesteps = [float(time) for time in record["timesteps"]]
        transform.groups = [RangedGroup([str(name) for name in group["linears"]]) for group in record["groups"]]
        if not transform.timesteps or not all(group.linears for group in transform.groups):
            raise ValueError("a table of ranges by timestep is empty")
        return transform


def adds_range(node: Node, before: Node) -> bool:
    """Whether ``node`` gives the output ``before`` of a linear its range back, or its bias after that."""
    other = node.args[1] if len(node.args) > 1 else None
    if node.args[:1] != (before,) or not isinstance(other, Node):
        return False
    if node.target is _ATEN.mul.Tensor:
        return other.target is _ATEN.view.default and _is_picked(other.args[0])
    return node.target is _ATEN.add.Tensor and other.op == "get_attr" and before.target is _ATEN.mul.Tensor


def _is_picked(node: object) -> bool:
    table = node.args[0] if isinstance(node, Node) and node.target is _ATEN.index_select.default else None
    return isinstance(table, Node) and str(table.target).rpartition(".")[2] == RANGES


def _is_static(make: object) -> bool:
    return callable(make) and isinstance(make(), StaticActivationObserver)


def _rescale(graph: GraphModule, node: Node, divided: Node, range_: Node) -> None:
    """Let a linear read the divided input, multiply its output by the range, and add its bias then."""
    value: Tensor = node.meta["val"]
    bias = node.args[2] if len(node.args) > 2 else None
    node.args = (divided, node.args[1])
    with graph.graph.inserting_after(node):
        total = call(graph, node, _ATEN.mul.Tensor, (node, range_), value)
    changed = [total]
    if isinstance(bias, Node):
        with graph.graph.inserting_after(total):
            total = call(graph, node, _ATEN.add.Tensor, (total, bias), value)
        changed.append(total)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user not in changed)


def _timestep_argument(samples: Sequence[Mapping[str, object]]) -> str:
    first = samples[0] if not isinstance(samples, Mapping) and samples else {}
    found = next((name for name in ARGUMENTS if isinstance(first.get(name), Tensor)), None)
    if found is None:
        raise ValueError(
            f"timestep_ranges needs samples with a timestep, a tensor named {' or '.join(ARGUMENTS)}; found "
            f"{', '.join(first) or 'no samples'}; see collect_samples(pipe, prompts)"
        )
    return found


def _timestep_of(sample: Mapping[str, object], argument: str) -> Tensor:
    """The timestep of one sample, of which all rows have the same."""
    times = sample.get(argument)
    if not isinstance(times, Tensor) or times.numel() == 0 or bool((times.flatten() != times.flatten()[0]).any()):
        raise ValueError(
            f"timestep_ranges needs one timestep for all rows of a sample; found {argument}={times}; give a sample a timestep"
        )
    return times.flatten()[0]


def _placeholder(graph: GraphModule, argument: str) -> Node:
    found = next((x for x in graph.graph.nodes if x.op == "placeholder" and x.target == argument), None)
    if found is None or found.meta["val"].ndim > 1:
        raise ValueError(f"this graph has no input {argument} of one number a row, by which ranges could be chosen")
    return found


def _same_batch(source: Node, batch: torch.Size) -> bool:
    """Whether a tensor ``(batch, …, channels)`` has one row for each timestep, or there is one timestep for all."""
    shape = source.meta["val"].shape
    return len(shape) > 1 and (not batch or str(batch[0]) in ("1", str(shape[0])))
