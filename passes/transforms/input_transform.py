"""``InputTransform``: what transforms have in common that look at the linears of each input together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer
from tqdm import tqdm

from fp4dit_ao.passes.transforms.annotated_linears import AnnotatedLinear, annotated_linears
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.passes.transforms.input_statistics import InputStatistics, input_statistics
from fp4dit_ao.passes.transforms.linear_groups import LinearGroup
from fp4dit_ao.passes.transforms.split_inputs import joins_or_is_part


class ChangedGroup(Protocol):
    """What became of the linears that share an input.

    Attributes:
        linears: their names; the first one has the tensor that they share.
    """

    linears: list[str]


class InputTransform(GraphTransform):
    """A transform that changes the input of linears, with a tensor that those that share it have in common.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        rows: of each input, kept to measure output errors on.

    Attributes:
        leaf: name of the shared tensor, beside the first linear's ``weight``.
        done: what was done to a linear, as a participle.
        statistics: what is noted of each input.
        groups: what became of which linears; those that are best left alone are in none.
        errors: by the name of the first linear of a group, the squared output error before and after, as parts of
            ``||X W^T||^2``.

    Raises:
        ValueError: fewer than one row.
    """

    needs_data: ClassVar[bool] = True
    leaf: ClassVar[str]
    done: ClassVar[str]
    statistics: ClassVar[type[InputStatistics]] = InputStatistics
    groups: Sequence[ChangedGroup]

    def __init__(self, quantizer: Quantizer | None, rows: int):
        if rows < 1:
            raise ValueError(f"{type(self).__name__}: rows={rows}; it must be at least 1")
        self.quantizer, self.rows = quantizer, rows
        self.errors: dict[str, tuple[float, float]] = {}

    def linears_to_change(self, graph: GraphModule) -> list[AnnotatedLinear]:
        """The linears that the quantizer quantizes.

        Raises:
            ValueError: there is no quantizer, or the graph was changed by such a transform before.
        """
        name = type(self).__name__
        if self.quantizer is None:
            raise ValueError(f"{name} needs to know the formats; give {name}(quantizer) an FP4DiTQuantizer")
        earlier = next((path for path, _ in graph.named_buffers() if path.rpartition(".")[2] == self.leaf), None)
        if earlier is not None:
            raise ValueError(f"this graph was {self.done} already: it has {earlier}; apply {self.name} once")
        return annotated_linears(graph, self.quantizer)

    def whole_linears(self, graph: GraphModule) -> list[AnnotatedLinear]:
        """Those of :meth:`linears_to_change` whose inputs are not split."""
        return [linear for linear in self.linears_to_change(graph) if not joins_or_is_part(linear.node)]

    def unchanged_linears(self, graph: GraphModule) -> list[AnnotatedLinear]:
        """Those of :meth:`whole_linears` whose weight no transform has replaced."""
        return [linear for linear in self.whole_linears(graph) if linear.weight == f"{linear.name}.weight"]

    def observed(
        self, graph: GraphModule, groups: Sequence[LinearGroup], samples: Sequence[Mapping[str, object]]
    ) -> Iterator[tuple[LinearGroup, list[InputStatistics]]]:
        """Each group with what was seen of its inputs, under a progress bar."""
        self.errors = {}
        sources = [source for group in groups for source in group.sources]
        seen = input_statistics(graph, samples, sources, self.rows, self.progress, self.statistics)
        for group in tqdm(groups, desc=self.name, unit="input", disable=not self.progress):
            yield group, [seen[source] for source in group.sources]

    def gaining(self, groups: Iterable[LinearGroup]) -> set[str]:
        """Patterns of groups whose :attr:`errors` sum to less over all blocks, so that all blocks keep one structure."""
        gain: dict[str, float] = {}
        for group in groups:
            before, after = self.errors[group.names[0]]
            gain[group.pattern] = gain.get(group.pattern, 0.0) + before - after
        return {pattern for pattern, total in gain.items() if total > 0}

    def shared_name(self, group: ChangedGroup) -> str:
        """Fully qualified name of the tensor that a group's linears share."""
        return f"{group.linears[0]}.{self.leaf}"

    @property
    def changes(self) -> bool:
        return bool(self.groups)

    def shared_tensors(self) -> dict[str, str]:
        return {f"{name}.{self.leaf}": self.shared_name(group) for group in self.groups for name in group.linears[1:]}
