"""Principal components of linears' inputs in high precision, and the rest of the inputs quantized (DiRotQ)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.linear_groups import LinearGroup, call, tensor_at
from fp4dit_ao.passes.transforms.low_rank import DOWN, Branch, BranchedGroup, LowRank, LowRankLinear, Trial

_ATEN = torch.ops.aten


class _Components(Branch):
    """The module form: the branch, and a quantized linear that does not see its directions."""

    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        down: Tensor = getattr(module, DOWN)
        return x - torch.matmul(torch.matmul(x, down), down.T)


class ComponentsLinear(LowRankLinear):
    """``linear(x - (x down) down^T) + (x down) up``."""

    step = _Components()


class PrincipalComponents(LowRank):
    """Keeps the directions that hold most of an input's energy in high precision, and quantizes the rest of it.

    ``X W^T = (X U)(W U)^T + Q(X - X U U^T) Q(W - W U U^T)^T`` with U ``(in_features, rank)``, the principal components of X:
    the eigenvectors of ``X^T X`` with the largest eigenvalues, on rows of the calibration data.

    Source: DiRotQ (arXiv 2605.16732). There inputs are multiplied by all eigenvectors, the coefficients of an eighth of them
    stay in 16 bits, the others are rotated by chance among themselves and quantized to 4, and the inverse goes into the
    weights. A graph keeps the shapes of its weights, so here the large components are subtracted instead: what remains is the
    same subspace in the float model's own channels, and the rotation by chance is a transform of its own, ``transforms=
    ["principal_components", "hadamard"]``, with ``rounding="gptq"`` the paper's best variant. That takes two products with a
    matrix of ``rank`` columns in place of one with ``in_features``. The columns ``W U`` stay in high precision here; the paper
    quantizes them with the others. (Its code keeps the weights of the float model and rotates quantized inputs back; and
    leaves the second linear of the feed-forward's inputs in 16 bits.)

    Linears that share an input share ``X U``; those at one place of all blocks get a branch if their errors sum to less with
    one. It costs what ``low_rank`` does with that rank, and the product with ``U^T``: for an eighth of the channels of a square
    weight, 4 bits a weight in a model of 16 bits. A smaller ``fraction`` costs less.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        fraction: of the input's channels, how many components are kept; the paper: 1/8.
        rows: of each input, kept: every other one to find components, as many as these at most, the rest to measure output
            errors on.

    Raises:
        ValueError: a fraction that is not between 0 and 1, or fewer than one row.
    """

    name: ClassVar[str] = "principal_components"
    done: ClassVar[str] = "given a branch for its principal components"
    module = ComponentsLinear

    def __init__(self, quantizer: Quantizer | None = None, fraction: float = 1 / 8, rows: int = 1024):
        if not 0 < fraction < 1:
            raise ValueError(f"PrincipalComponents: fraction={fraction}; it must be more than 0 and less than 1")
        super().__init__(quantizer, rounds=0, rows=rows)
        self.fraction = fraction

    def _fitted(self, graph: GraphModule, group: LinearGroup, rows: Tensor) -> tuple[BranchedGroup, float, float]:
        weights = [tensor_at(graph, linear.weight) for linear in group.members]
        fitted, rows = rows[::2], rows[1::2]
        rank = max(1, min(round(self.fraction * fitted.shape[1]), len(fitted)))
        down = principal_components(fitted, rank).to(fitted.dtype)
        ups = [(weight.float() @ down.float()).T.contiguous().to(weight.dtype) for weight in weights]
        low = torch.cat([up.T.float() for up in ups]) @ down.T.float()
        before, _ = Trial(graph, group, rows).quantized(torch.zeros_like(low))
        rest = rows - rows @ down @ down.T
        after, _ = Trial(graph, group, rows, rest).quantized(low)
        return BranchedGroup(group.names, rank, down, ups), before, after

    def _quantized_input(self, graph: GraphModule, reader: Node, source: Node, narrow: Node, down: Node) -> Node:
        value: Tensor = source.meta["val"]
        turned = call(graph, reader, _ATEN.t.default, (down,), down.meta["val"].T)
        wide = call(graph, reader, _ATEN.matmul.default, (narrow, turned), value)
        return call(graph, reader, _ATEN.sub.Tensor, (source, wide), value)

    def refused_loras(self) -> dict[str, str]:
        """Every changed linear: a fused LoRA would not see the components that its input lacks."""
        why = f"whose input lacks its principal components; quantize without the transform {self.name!r} to use it"
        return {name: why for group in self.groups for name in group.linears}


def principal_components(rows: Tensor, rank: int) -> Tensor:
    """The ``rank`` eigenvectors of ``X^T X`` with the largest eigenvalues, as columns: float32 ``(channels, rank)``.

    Args:
        rows: X ``(rows, channels)``, of any float type.
        rank: at most ``channels``.
    """
    wide = rows.float()
    return torch.linalg.eigh((wide.T @ wide).double()).eigenvectors[:, -rank:].flip(1).float().contiguous()
