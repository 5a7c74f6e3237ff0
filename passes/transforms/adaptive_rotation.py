"""Adaptive rotation (LRQ-DiT): Hadamard where inputs have mild outliers, two fitted rotations where they have massive ones."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.dual_rotation import DualRotation, dual_rotation
from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.hadamard import ROTATION, SMALLEST, Hadamard, RotatedGroup, rotate, rotation
from fp4dit_ao.passes.transforms.input_statistics import kept_rows
from fp4dit_ao.passes.transforms.input_transform import InputTransform
from fp4dit_ao.passes.transforms.linear_groups import LinearGroup, groups_by_input, tensor_at
from fp4dit_ao.passes.transforms.online_transform import OnlineTransform
from fp4dit_ao.passes.transforms.outlier_groups import OrderedGroup, OutlierGroups
from fp4dit_ao.passes.transforms.trial_quantization import OutputError

SECOND = "second_rotation"
"""Name of the matrix that a reordered input is multiplied by."""


class _First(Hadamard):
    """Rotations by given matrices, which are orthogonal but for the rounding to the model's type; that, weights undo."""

    def changed_weight(self, weight: Tensor, shared: Tensor) -> Tensor:
        inverse = torch.linalg.inv(shared.double()).T.float()
        return rotate(weight.float(), inverse).to(weight.dtype)


class _Second(_First):
    leaf: ClassVar[str] = SECOND


class AdaptiveRotation(InputTransform):
    """Rotates linears' inputs, and their weights by the same, by a Hadamard matrix or, where outliers are massive, by two.

    Source: LRQ-DiT (arXiv 2508.03485). The fluctuation of a linear's input is ``J = ||X||_F / sqrt(B N C)``, its root mean
    square. Where it is less than ``threshold`` (the paper: 1), outliers are mild, and blocks of channels are rotated by a
    randomised Hadamard matrix, as ``hadamard`` does. Elsewhere they are massive: few channels
    hold most of the energy, and are rotated twice, by matrices that are fitted to them, with the channels dealt out to the
    blocks in between, as in DuQuant (arXiv 2406.01721): see ``passes.transforms.dual_rotation``. The paper divides by
    SmoothQuant's factors first: ``transforms=["smoothquant", "adaptive_rotation"]``. Its other half, the twin log quantizer of
    weights, is the formats ``twin_log_…``, recipe ``w4a4_twin_log``.

    Where paper and code differ: the code computes no J, but has a list of massive layers (queries of cross-attention in the
    last blocks of PixArt), and its search for the outlier takes the number of its row for that of its channel. Here J decides,
    for one place of all blocks by the block where it is largest, and places are rotated if that errs less at the output in the
    quantizer's own formats; ``everywhere=True`` does as the paper.

    It costs what ``hadamard`` does, and where outliers are massive twice that and a gather. Linears whose input joins tensors
    are left to ``split_inputs``, and massive ones whose width is no multiple of 16 as they are.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        block: channels of a block, at most; a power of two.
        threshold: J from which outliers count as massive.
        steps: most steps of each fitted rotation.
        rows: of each input, kept to fit rotations and measure output errors on.
        seed: of signs and random matrices.
        everywhere: rotate every linear, whatever its error.

    Attributes:
        fluctuation: J of every group, by the name of its first linear.

    Raises:
        ValueError: a block that is no power of two from 16 on, a threshold that is not positive, or fewer than one step or row.
    """

    name: ClassVar[str] = "adaptive_rotation"
    leaf: ClassVar[str] = ROTATION
    done: ClassVar[str] = "rotated"
    fits_single_file: ClassVar[bool] = False

    def __init__(
        self,
        quantizer: Quantizer | None = None,
        block: int = 128,
        threshold: float = 1.0,
        steps: int = 256,
        rows: int = 512,
        seed: int = 0,
        everywhere: bool = False,
    ):
        super().__init__(quantizer, rows)
        if block < SMALLEST or block & (block - 1):
            raise ValueError(f"AdaptiveRotation: block={block}; it must be a power of two from {SMALLEST} on")
        if not threshold > 0 or steps < 1:
            raise ValueError(
                f"AdaptiveRotation: threshold={threshold} and steps={steps}; the one must be more than 0, the other at least 1"
            )
        self.block, self.threshold, self.steps, self.seed, self.everywhere = block, threshold, steps, seed, everywhere
        self.fluctuation: dict[str, float] = {}
        self._first, self._order, self._second = _First(), OutlierGroups(), _Second()

    @property
    def groups(self) -> Sequence[RotatedGroup]:  # type: ignore[override]
        """What is rotated at all."""
        return self._first.groups

    @property
    def _parts(self) -> dict[str, OnlineTransform[RotatedGroup] | OnlineTransform[OrderedGroup]]:
        return {"first": self._first, "order": self._order, "second": self._second}

    # --- learning ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Choose the linears to rotate among those that the quantizer quantizes, and fit the rotations.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that is rotated already.
        """
        linears = self.whole_linears(graph)
        groups = [group for group in groups_by_input(graph, linears) if self._block_of(graph, group) >= SMALLEST]
        seen = {group.names[0]: kept_rows(seen) for group, seen in self.observed(graph, groups, samples)}
        self.fluctuation = {name: float(rows.float().square().mean().sqrt()) for name, rows in seen.items()}
        largest: dict[str, float] = {}
        for group in groups:
            largest[group.pattern] = max(largest.get(group.pattern, 0.0), self.fluctuation[group.names[0]])
        found: dict[str, tuple[Tensor, DualRotation | None]] = {}
        for group in groups:
            rows, block = seen[group.names[0]], self._block_of(graph, group)
            massive = largest[group.pattern] >= self.threshold
            dual = dual_rotation(rows, block, self.steps, self.seed) if massive else None
            first = dual.first if dual else rotation(block, self.seed)
            found[group.names[0]] = first, dual
            self.errors[group.names[0]] = self._errors(graph, group, rows, first, dual)
        chosen = {group.pattern for group in groups} if self.everywhere else self.gaining(groups)
        kept = [(group.names, *found[group.names[0]]) for group in groups if group.pattern in chosen]
        self._first.groups = [RotatedGroup(names, len(first), first) for names, first, _ in kept]
        self._order.groups = [OrderedGroup(names, dual.order) for names, _, dual in kept if dual]
        self._second.groups = [RotatedGroup(names, len(dual.second), dual.second) for names, _, dual in kept if dual]
        for part in self._parts.values():
            part.fitted = True

    def _block_of(self, graph: GraphModule, group: LinearGroup) -> int:
        width = tensor_at(graph, group.linears[0].weight).shape[1]
        return min(width & -width, self.block)

    def _errors(
        self, graph: GraphModule, group: LinearGroup, rows: Tensor, first: Tensor, dual: DualRotation | None
    ) -> tuple[float, float]:
        weights = [tensor_at(graph, linear.weight) for linear in group.members]
        error = OutputError(group.members, weights, rows)
        before = error.of(weights, rows)
        matrix = first.to(rows)
        changed, rows = [self._first.changed_weight(w, matrix) for w in weights], rotate(rows, matrix)
        if dual is not None:
            order, matrix = dual.order.to(rows.device), dual.second.to(rows)
            changed = [self._second.changed_weight(w[:, order], matrix) for w in changed]
            rows = rotate(rows[:, order], matrix)
        return before, error.of(changed, rows)

    # --- applying: one part after the other -------------------------------------------------------------------------------

    def rewrite(self, graph: GraphModule) -> None:
        for part in self._parts.values():
            part.rewrite(graph)

    def apply_to_modules(self, model: nn.Module) -> None:
        for part in self._parts.values():
            part.apply_to_modules(model)

    def shared_tensors(self) -> dict[str, str]:
        return {own: shared for part in self._parts.values() for own, shared in part.shared_tensors().items()}

    def refused_loras(self) -> dict[str, str]:
        """Every rotated linear: fusing a LoRA does not know that its weight is for rotated inputs."""
        why = f"whose input is {self.done}; quantize without the transform {self.name!r} to use it"
        return {name: why for group in self.groups for name in group.linears}

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        found: Tensor | None = weight
        for part in self._parts.values():
            found = None if found is None else part.float_weight(name, found, graph)
        return found

    # --- records -----------------------------------------------------------------------------------------------------

    def to_record(self) -> Record:
        return {place: part.to_record() for place, part in self._parts.items()}

    @classmethod
    def from_record(cls, record: Record) -> Self:
        transform = cls()
        transform._first = _First.from_record(record["first"])
        transform._order = OutlierGroups.from_record(record["order"])
        transform._second = _Second.from_record(record["second"])
        return transform
