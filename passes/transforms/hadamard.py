"""Hadamard rotations: every block of a linear's input channels mixed evenly, so that no channel stands out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.input_statistics import kept_rows
from fp4dit_ao.passes.transforms.linear_groups import (
    LinearGroup,
    call,
    groups_by_input,
    tensor_at,
)
from fp4dit_ao.passes.transforms.online_transform import OnlineTransform
from fp4dit_ao.passes.transforms.transformed_linear import TransformedLinear
from fp4dit_ao.passes.transforms.trial_quantization import OutputError

ROTATION = "rotation"
"""Name of the matrix ``(block, block)`` that every block of the input is multiplied by, beside ``weight`` and ``bias``."""
SMALLEST = 16
"""Channels of the smallest block that is rotated: fewer spread an outlier over too little."""
_ATEN = torch.ops.aten


@dataclass
class RotatedGroup:
    """Linears that share a rotated input.

    Attributes:
        linears: their names; the matrix is the first one's ``rotation``.
        block: channels that are mixed with one another.
        matrix: ``(block, block)``; None in a transform from a record.
    """

    linears: list[str]
    block: int
    matrix: Tensor | None = None


class Hadamard(OnlineTransform[RotatedGroup]):
    """Multiplies a linear's input by an orthogonal block-diagonal matrix R, and its weight by the same: ``(X R)(W R)^T``.

    Source: QuaRot (arXiv 2404.00456): R is a randomised Hadamard matrix, ``diag(+-1) H / sqrt(n)``. The paper folds
    most of them into neighbouring layers across an RMSNorm; the LayerNorm and modulation of diffusion transformers let nothing
    pass, so that inputs are rotated online here, in blocks of the largest power of two that divides the width, at most
    ``block`` (128 divides all widths of the usual transformers, and is a group of weights). Weights absorb it beforehand. Its
    entries are ``+-2^-k`` with k = ``ceil(log2(n) / 2)``, exact in every float type: ``R R^T = c I`` with c = 1 or 1/2, and the
    weight is divided by c.

    It helps where channels or weights have outliers and many values share a scale. Where they are bell-shaped it gains nothing;
    in blocks of 16 (NVFP4), which isolate outliers, and with codebooks, which fit other shapes, little or less than that. Hence
    each linear's output error is measured in the quantizer's own formats on rows of the calibration data, with and without, and
    those at one place of all blocks are rotated if their errors sum to less (so that all blocks keep one structure).

    It costs ``block`` multiplications a channel and token, beside ``out_features`` of the linear. Linears whose input joins
    tensors are left to ``split_inputs``.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        block: channels of a block, at most; a power of two.
        rows: of each input, kept to measure output errors on.
        seed: of the signs.
        everywhere: rotate every linear, whatever its error.

    Raises:
        ValueError: a block that is no power of two from 16 on, or fewer than one row.
    """

    name: ClassVar[str] = "hadamard"
    leaf: ClassVar[str] = ROTATION
    done: ClassVar[str] = "rotated"

    def __init__(
        self,
        quantizer: Quantizer | None = None,
        block: int = 128,
        rows: int = 512,
        seed: int = 0,
        everywhere: bool = False,
    ):
        super().__init__(quantizer, rows)
        if block < SMALLEST or block & (block - 1):
            raise ValueError(f"Hadamard: block={block}; it must be a power of two from {SMALLEST} on")
        self.block, self.seed, self.everywhere = block, seed, everywhere

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Choose the linears to rotate among those that the quantizer quantizes.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that is rotated already.
        """
        linears = self.whole_linears(graph)
        groups = [group for group in groups_by_input(graph, linears) if self._block_of(graph, group) >= SMALLEST]
        for group, seen in self.observed(graph, groups, samples):
            self.errors[group.names[0]] = self._errors(graph, group, kept_rows(seen))
        chosen = {group.pattern for group in groups} if self.everywhere else self.gaining(groups)
        blocks = [(group, self._block_of(graph, group)) for group in groups if group.pattern in chosen]
        self.groups = [RotatedGroup(group.names, block, self.matrix(block)) for group, block in blocks]
        self.fitted = True

    def largest_block(self, width: int) -> int:
        """Channels of the largest block that divides ``width`` channels, and that there is a matrix for."""
        return min(width & -width, self.block)

    def matrix(self, block: int) -> Tensor:
        """The matrix of a block: float32 ``(block, block)``, a multiple of an orthogonal one, exact in every float type."""
        return rotation(block, self.seed)

    def _block_of(self, graph: GraphModule, group: LinearGroup) -> int:
        return self.largest_block(tensor_at(graph, group.linears[0].weight).shape[1])

    def _errors(self, graph: GraphModule, group: LinearGroup, rows: Tensor) -> tuple[float, float]:
        weights = [tensor_at(graph, linear.weight) for linear in group.members]
        error = OutputError(group.members, weights, rows)
        matrix = self.matrix(self._block_of(graph, group)).to(rows)
        rotated = [rotated_weight(weight, matrix) for weight in weights]
        return error.of(weights, rows), error.of(rotated, rotate(rows, matrix))

    # --- what is changed -------------------------------------------------------------------------------------------------

    def shared_value(self, group: RotatedGroup, like: Tensor) -> Tensor:
        matrix = torch.eye(group.block) if group.matrix is None else group.matrix
        return matrix.to(like.device, like.dtype)

    def changed_weight(self, weight: Tensor, shared: Tensor) -> Tensor:
        return rotated_weight(weight, shared)

    def changed_input(self, graph: GraphModule, reader: Node, source: Node, shared: Node, group: RotatedGroup) -> Node:
        value: Tensor = source.meta["val"]
        sizes = [value.shape[-1] // group.block, group.block]
        blocks = call(graph, reader, _ATEN.unflatten.int, (source, -1, sizes), value.unflatten(-1, sizes))
        mixed = call(graph, reader, _ATEN.matmul.default, (blocks, shared), blocks.meta["val"])
        return call(graph, reader, _ATEN.flatten.using_ints, (mixed, -2, -1), value)

    def changed_module(self, linear: nn.Linear, shared: Tensor, stored: bool) -> nn.Module:
        return RotatedLinear(linear, shared, stored, self.leaf)

    # --- records -----------------------------------------------------------------------------------------------------

    def to_record(self) -> Record:
        return {"groups": [{"linears": list(group.linears), "block": group.block} for group in self.groups]}

    @classmethod
    def from_record(cls, record: Record) -> Self:
        transform = cls()
        transform.groups = [
            RotatedGroup([str(name) for name in group["linears"]], int(group["block"])) for group in record["groups"]
        ]
        if not all(group.linears and group.block > 0 for group in transform.groups):
            raise ValueError("a group of rotated linears is empty")
        return transform


class _Rotation:
    def __init__(self, leaf: str):
        self.leaf = leaf

    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        return rotate(x, getattr(module, self.leaf))

    def beside(self, module: nn.Module, x: Tensor) -> None:
        return None

    def undone(self, module: nn.Module, weight: Tensor) -> Tensor:
        matrix: Tensor = getattr(module, self.leaf)
        return rotate(weight, matrix.T.to(weight))


class RotatedLinear(TransformedLinear):
    """``linear(x R)``, block by block.

    Args:
        linear: that it replaces; its parameters are shared.
        matrix: ``(block, block)``, of the input's type.
        stored: whether the matrix is one of the model's own tensors, rather than that of another linear with the same input.
        leaf: its name.
    """

    def __init__(self, linear: nn.Linear, matrix: Tensor, stored: bool = True, leaf: str = ROTATION):
        super().__init__(linear, _Rotation(leaf), {leaf: matrix}, {leaf: stored})


def rotation(block: int, seed: int = 0) -> Tensor:
    """A randomised Hadamard matrix with entries ``+-2^-k``, k = ``ceil(log2(block) / 2)``; float32 ``(block, block)``.

    Args:
        block: a power of two.
        seed: of the signs.
    """
    signs = torch.randint(0, 2, (block, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs * sylvester(block) * 2.0 ** -math.ceil(math.log2(block) / 2)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Every block of the last dimension times ``matrix`` ``(block, block)``."""
    return torch.matmul(x.unflatten(-1, (x.shape[-1] // len(matrix), len(matrix))), matrix).flatten(-2, -1)


def rotated_weight(weight: Tensor, matrix: Tensor) -> Tensor:
    """The weight ``(out_features, in_features)`` of inputs that are multiplied by ``matrix``, ``c`` times an orthogonal one."""
    wide = matrix.float()
    return (rotate(weight.float(), wide) / wide[0].square().sum()).to(weight.dtype)


def sylvester(block: int) -> Tensor:
    """Sylvester's Hadamard matrix of a size that is a power of two: float32 ``(block, block)`` of 1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
