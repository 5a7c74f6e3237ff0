"""Weight equalization: equal ranges for each channel that one quantized linear writes and another reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.annotated_linears import annotated_linears
from fp4dit_ao.passes.transforms.folding import foldable_parameters
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform, Record
from fp4dit_ao.passes.transforms.linear_groups import (
    calls_of,
    groups_by_input,
    nodes_by_linear,
    replace_parameter,
    tensor_at,
)


@dataclass
class EqualizedPair:
    """Two linears, the second of which reads the channels that the first writes.

    Attributes:
        folded: parameters of the first, whose rows are divided: its weight, and its bias if it has one.
        linears: names of the second, or of several that read the same; their weights' columns are multiplied.
        factor: ``(channels,)``, float32; None in a transform from a record.
    """

    folded: list[str]
    linears: list[str]
    factor: Tensor | None = None


class WeightEqualization(GraphTransform):
    """Divides row i of a linear's weight and bias by ``s_i``, and multiplies column i of the next one's weight by it.

    ``s_i = sqrt(r1_i / r2_i)`` with ``r1_i`` the largest magnitude of that row and ``r2_i`` that of the column: afterwards both
    are ``sqrt(r1_i r2_i)`` (data-free quantization, arXiv 1906.04721; for minifloats: arXiv 2311.12359). Where
    several linears read the same channels, ``r2`` is the largest of theirs.

    What lies between the two must commute with the factors. In a diffusion transformer that is attention, which is linear in
    each channel of its values: the pairs are value and output projections. Nothing passes a GELU, and the LayerNorm before a
    linear has no quantized weight (``SmoothQuant(fold=True)`` changes those). The linear half of a gated feed-forward would
    commute, too; it is not looked for. A float scale for each row, or for groups along it, takes a factor of the row up by
    itself: there it is the columns of the second linear that gain.

    No data is needed, no operation is added, and files look as without. It is not measured whether a linear errs less.

    Args:
        quantizer: both linears of a pair are among those that it quantizes.
    """

    name: ClassVar[str] = "weight_equalization"
    needs_data: ClassVar[bool] = False

    def __init__(self, quantizer: Quantizer | None = None):
        self.quantizer = quantizer
        self.pairs: list[EqualizedPair] = []

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]] = ()) -> None:
        """Find the pairs and their factors; ``samples`` have no influence.

        Raises:
            ValueError: no quantizer.
        """
        if self.quantizer is None:
            raise ValueError(
                "WeightEqualization needs to know which linears are quantized; give WeightEqualization(quantizer) an "
                "FP4DiTQuantizer"
            )
        linears = annotated_linears(graph, self.quantizer)
        quantized = {linear.weight for linear in linears}
        self.pairs = []
        for group in groups_by_input(graph, linears):
            if len(group.sources) != 1:
                continue
            folded = foldable_parameters(graph, group.sources[0], [linear.node for linear in group.linears])
            if folded and folded[0] in quantized:
                columns = [tensor_at(graph, linear.weight).float().abs().amax(0) for linear in group.members]
                rows = tensor_at(graph, folded[0]).float().abs().amax(1)
                factor = equalizing_factor(rows, torch.stack(columns).amax(0))
                self.pairs.append(EqualizedPair(folded, group.names, factor))

    @property
    def changes(self) -> bool:
        return bool(self.pairs)

    @torch.no_grad()
    def rewrite(self, graph: GraphModule) -> None:
        linears = nodes_by_linear(graph)
        for pair in self.pairs:
            calls_of(linears, pair.linears, "equalized")
            if pair.factor is not None:
                for path in pair.folded:
                    old = tensor_at(graph, path)
                    replace_parameter(graph, path, old.float() / pair.factor.reshape(-1, *[1] * (old.ndim - 1)))
                for name in pair.linears:
                    path = f"{name}.weight"
                    replace_parameter(graph, path, tensor_at(graph, path).float() * pair.factor)

    def apply_to_modules(self, model: nn.Module) -> None:
        """Nothing: parameters keep their names and shapes, and their values are loaded."""

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        return None if name in self._changed() else weight

    def refused_loras(self) -> dict[str, str]:
        """Every linear of a pair: a LoRA of the float model has its channels in other units."""
        why = "whose channels were equalized with another's; quantize without the transform 'weight_equalization' to use it"
        return {name.removesuffix(".weight"): why for name in self._changed() if name.endswith(".weight")}

    def _changed(self) -> set[str]:
        return {
            name for pair in self.pairs for name in (*pair.folded, *(f"{linear}.weight" for linear in pair.linears))
        }

    def to_record(self) -> Record:
        return {"pairs": [{"folded": list(pair.folded), "linears": list(pair.linears)} for pair in self.pairs]}

    @classmethod
    def from_record(cls, record: Record) -> "WeightEqualization":
        transform = cls()
        transform.pairs = [
            EqualizedPair([str(name) for name in pair["folded"]], [str(name) for name in pair["linears"]])
            for pair in record["pairs"]
        ]
        if not all(pair.folded and pair.linears for pair in transform.pairs):
            raise ValueError("a pair of equalized linears is empty")
        return transform


def equalizing_factor(rows: Tensor, columns: Tensor) -> Tensor:
    """``sqrt(r1 / r2)`` of every channel; 1 where one of the two ranges is zero.

    Args:
        rows: float32 ``(channels,)``, the largest magnitudes of the first weight's rows, r1.
        columns: those of the second one's columns, r2.
    """
    alive = (rows > 0) & (columns > 0)
    ones = torch.ones_like(rows)
    return torch.where(alive, (rows.where(alive, ones) / columns.where(alive, ones)).sqrt(), ones)
