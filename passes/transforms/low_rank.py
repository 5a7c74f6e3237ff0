"""A low-rank branch in high precision beside each quantized linear, which takes what quantizes worst (SVDQuant)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import Quantizer

from fp4dit_ao.passes.transforms.annotated_linears import MakeObserver, weight_path
from fp4dit_ao.passes.transforms.graph_transform import Record
from fp4dit_ao.passes.transforms.input_statistics import kept_rows
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
from fp4dit_ao.passes.transforms.transformed_linear import Step, TransformedLinear
from fp4dit_ao.passes.transforms.trial_quantization import fake_quantized

DOWN, UP = "low_rank_down", "low_rank_up"
"""Names of the branch's tensors ``(in_features, rank)`` and ``(rank, out_features)``, beside ``weight`` and ``bias``."""
OVERSAMPLING, POWERS = 8, 4
"""Further directions and passes of subspace iteration, with which the leading ones are exact to a few digits."""
_ATEN = torch.ops.aten


@dataclass
class BranchedGroup:
    """Linears that share an input and the branch's first product.

    Attributes:
        linears: their names; ``low_rank_down`` is the first one's, ``low_rank_up`` each one's own.
        rank: of the branch.
        down: ``(in_features, rank)``; None in a transform from a record.
        ups: ``(rank, out_features)`` of each linear.
    """

    linears: list[str]
    rank: int
    down: Tensor | None = None
    ups: list[Tensor] = field(default_factory=list)


class LowRank(InputTransform):
    """Splits weights into a low-rank part that stays in high precision and a residual that is quantized.

    ``W = L + R``, ``Y = X L^T + Q(X) Q(R)^T`` with L of rank ``rank`` (SVDQuant, arXiv 2411.05007; there behind
    smoothing, here too if ``smoothquant`` comes first). L starts as the leading singular vectors of W, and is then refitted
    to what quantization leaves, as in the authors' code: ``L = SVD_r(W - Q(R))``, ``R = W - L``, until the output error
    ``||X W^T - X L^T - Q(X) Q(R)^T||^2`` on rows of the calibration data does not fall any more; the best is kept. Linears
    that share an input (q, k and v) are one linear with their rows joined: they share ``X L2``, of ``L = L1 L2``. Linears at
    one place of all blocks get a branch if their errors sum to less with one, so that all blocks keep one structure.

    It is independent of the number format, and works with whatever granularity, block format or codebook the quantizer has:
    the finer the groups, the less it gains. Rounding (GPTQ, learned rounding) then works on R.

    A branch costs ``rank (in_features + out_features)`` numbers of the model's type and as many multiplications a token: with
    rank 32, about 6 % of those of a linear of 1152 by 1152. No kernel fuses it. Linears whose input joins tensors are left to
    ``split_inputs``.

    Args:
        quantizer: says which linears are quantized, and with which observers.
        rank: of the branch, at most the smaller side of the joined weight.
        rounds: most refits of L.
        rows: of each input, kept to measure output errors on.

    Raises:
        ValueError: a rank or rows less than 1, or negative rounds.
    """

    name: ClassVar[str] = "low_rank"
    leaf: ClassVar[str] = DOWN
    done: ClassVar[str] = "given a low-rank branch"
    fits_single_file: ClassVar[bool] = False
    module: ClassVar[type["LowRankLinear"]]
    groups: list[BranchedGroup]

    def __init__(self, quantizer: Quantizer | None = None, rank: int = 32, rounds: int = 100, rows: int = 512):
        super().__init__(quantizer, rows)
        if rank < 1 or rounds < 0:
            raise ValueError(f"LowRank: rank={rank} and rounds={rounds}; rank must be at least 1, rounds at least 0")
        self.rank, self.rounds = rank, rounds
        self.groups = []

    # --- learning ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, object]]) -> None:
        """Find a branch for every linear that the quantizer quantizes.

        Raises:
            ValueError: no quantizer, no samples, samples that do not fit, or a graph that has branches already.
        """
        linears = self.unchanged_linears(graph)
        groups = groups_by_input(graph, linears)
        found = {}
        for group, seen in self.observed(graph, groups, samples):
            branched, before, after = self._fitted(graph, group, kept_rows(seen))
            self.errors[group.names[0]] = (before, after)
            found[group.names[0]] = branched
        chosen = self.gaining(groups)
        self.groups = [found[group.names[0]] for group in groups if group.pattern in chosen]

    def _fitted(self, graph: GraphModule, group: LinearGroup, rows: Tensor) -> tuple[BranchedGroup, float, float]:
        """The best branch of a group, and the relative errors without and with it."""
        trial = Trial(graph, group, rows)
        rank = min(self.rank, *trial.joined.shape)
        before, _ = trial.quantized(torch.zeros_like(trial.joined))
        best: tuple[float, Tensor, Tensor] | None = None
        target = trial.joined
        for _ in range(self.rounds + 1):
            up, down = (factor.to(trial.dtype) for factor in leading_factors(target, rank))
            low = up.float() @ down.float()
            error, rounded = trial.quantized(low)
            if best is not None and error >= best[0]:
                break
            best = (error, up, down)
            target = trial.joined - rounded
        assert best is not None
        ups = [up.T.contiguous() for up in best[1].split(trial.sizes)]
        return BranchedGroup(group.names, rank, best[2].T.contiguous(), ups), before, best[0]

    # --- applying ----------------------------------------------------------------------------------------------------

    def rewrite(self, graph: GraphModule) -> None:
        linears = nodes_by_linear(graph)
        for group in self.groups:
            nodes = calls_of(linears, group.linears, self.done)
            weights = {name: tensor_at(graph, f"{name}.weight") for name in group.linears}
            down, ups = self._tensors(group, weights)
            if group.down is not None:
                for name, weight in weights.items():
                    replace_parameter(graph, f"{name}.weight", residual(weight, down, ups[name]))
            for source, readers in readers_by_source(graph, nodes):
                value: Tensor = source.meta["val"]
                with graph.graph.inserting_before(readers[0]):
                    factor = stored_tensor(graph, readers[0], self.shared_name(group), down)
                    product = value.new_empty([*value.shape[:-1], group.rank])
                    narrow = call(graph, readers[0], _ATEN.matmul.default, (source, factor), product)
                    quantized = self._quantized_input(graph, readers[0], source, narrow, factor)
                for node in readers:
                    node.update_arg(0, quantized)
                    _add_branch(graph, node, narrow, ups[weight_path(node).removesuffix(".weight")])

    def _quantized_input(self, graph: GraphModule, reader: Node, source: Node, narrow: Node, down: Node) -> Node:
        """What the quantized linears read, given their input ``source`` and its product ``narrow`` with the matrix ``down``."""
        return source

    def _tensors(self, group: BranchedGroup, weights: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The branch of a fitted transform; zeros in one from a record, until stored tensors take their places."""
        if group.down is not None:
            return group.down, dict(zip(group.linears, group.ups, strict=True))
        first = weights[group.linears[0]]
        down = torch.zeros(first.shape[1], group.rank, dtype=first.dtype, device=first.device)
        return down, {
            name: torch.zeros(group.rank, weight.shape[0], dtype=weight.dtype, device=weight.device)
            for name, weight in weights.items()
        }

    def apply_to_modules(self, model: nn.Module) -> None:
        for group in self.groups:
            linears = {name: module_of(model, name, self.done) for name in group.linears}
            down, ups = self._tensors(
                BranchedGroup(group.linears, group.rank), {name: linear.weight for name, linear in linears.items()}
            )
            for name, linear in linears.items():
                model.set_submodule(name, self.module(linear, down, ups[name], name == group.linears[0]))

    def float_weight(self, name: str, weight: Tensor, graph: GraphModule) -> Tensor | None:
        owner = name.rpartition(".")[0]
        for group in self.groups:
            if owner in group.linears and name.endswith(".weight"):
                down, up = (
                    tensor_at(graph, path).to(weight.device) for path in (self.shared_name(group), f"{owner}.{UP}")
                )
                return residual(weight, down, up)
        return weight

    # --- records -----------------------------------------------------------------------------------------------------

    def to_record(self) -> Record:
        return {"groups": [{"linears": list(group.linears), "rank": group.rank} for group in self.groups]}

    @classmethod
    def from_record(cls, record: Record) -> Self:
        transform = cls()
        transform.groups = [
            BranchedGroup([str(name) for name in group["linears"]], int(group["rank"])) for group in record["groups"]
        ]
        if not all(group.linears and group.rank > 0 for group in transform.groups):
            raise ValueError("a group of linears with a low-rank branch is empty")
        return transform


class Trial:
    """The linears of one group, as they would be quantized beside a branch.

    Args:
        graph: that holds their weights.
        group: of linears.
        rows: of their input, ``(rows, in_features)``.
        quantized_rows: what is quantized of them; they themselves if None.

    Attributes:
        joined: the weights' rows, float32.
        sizes: how many each weight has.
    """

    def __init__(self, graph: GraphModule, group: LinearGroup, rows: Tensor, quantized_rows: Tensor | None = None):
        self.members = group.members
        weights = [tensor_at(graph, linear.weight) for linear in self.members]
        self.dtype, self.sizes = weights[0].dtype, [len(weight) for weight in weights]
        self.joined = torch.cat([weight.float() for weight in weights])
        self.rows = rows
        inputs = rows if quantized_rows is None else quantized_rows
        made: dict[MakeObserver | None, Tensor] = {None: inputs.float()}
        for linear in self.members:
            observer = linear.input_observer
            if observer is not None and observer not in made:
                made[observer] = fake_quantized(observer, inputs).float()
        self.inputs = [made[linear.input_observer] for linear in self.members]
        self.wanted = rows.float() @ self.joined.T
        self.size = max(float(self.wanted.square().sum()), torch.finfo(torch.float32).tiny)

    def quantized(self, low: Tensor) -> tuple[float, Tensor]:
        """The relative output error with the low-rank part ``low``, and the quantized residual."""
        residuals = (self.joined - low).to(self.dtype).split(self.sizes)
        rounded = [
            fake_quantized(linear.weight_observer, weight, self.rows).float()
            for linear, weight in zip(self.members, residuals, strict=True)
        ]
        products = [x @ weight.T for x, weight in zip(self.inputs, rounded, strict=True)]
        found = torch.cat(products, -1) + self.rows.float() @ low.T
        return float((found - self.wanted).square().sum()) / self.size, torch.cat(rounded)


class Branch:
    """The branch in the module form."""

    def before(self, module: nn.Module, x: Tensor) -> Tensor:
        return x

    def beside(self, module: nn.Module, x: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(x, getattr(module, DOWN)), getattr(module, UP))

    def undone(self, module: nn.Module, weight: Tensor) -> Tensor:
        low = getattr(module, DOWN).float() @ getattr(module, UP).float()
        return (weight.float() + low.T).to(weight.dtype)


class LowRankLinear(TransformedLinear):
    """``linear(x) + (x down) up``; a subclass may give the linear another input.

    Args:
        linear: that it replaces; its parameters are shared.
        down: ``(in_features, rank)``, of the input's type.
        up: ``(rank, out_features)``.
        stored: whether ``down`` is one of the model's own tensors, rather than that of another linear with the same input.
    """

    step: ClassVar[Step] = Branch()

    def __init__(self, linear: nn.Linear, down: Tensor, up: Tensor, stored: bool = True):
        super().__init__(linear, self.step, {DOWN: down, UP: up}, {DOWN: stored, UP: True})


LowRank.module = LowRankLinear


def residual(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``weight`` ``(out_features, in_features)`` less the branch."""
    return (weight.float() - (down.float() @ up.float()).T).to(weight.dtype)


def leading_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``up`` ``(rows, rank)`` and ``down`` ``(rank, columns)``, whose product is nearest to ``weight`` (float32) of that rank.

    By subspace iteration from a fixed start; exact where ``rank`` is close to the smaller side. ``up`` is orthonormal.
    """
    wide = min(*weight.shape, rank + OVERSAMPLING)
    start = torch.randn(weight.shape[1], wide, generator=torch.Generator().manual_seed(0)).to(weight)
    basis = torch.linalg.qr(weight @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    inner = torch.linalg.svd(basis.T @ weight, full_matrices=False).U[:, :rank]
    up = basis @ inner
    return up, up.T @ weight


def adds_branch(node: Node, linear: Node) -> bool:
    """Whether ``node`` adds a low-rank branch to the output of ``linear``."""
    if node.target is not _ATEN.add.Tensor or node.args[0] is not linear:
        return False
    branch = node.args[1]
    up = branch.args[1] if isinstance(branch, Node) and branch.target is _ATEN.matmul.default else None
    return isinstance(up, Node) and up.op == "get_attr" and str(up.target).rpartition(".")[2] == UP


def _add_branch(graph: GraphModule, node: Node, narrow: Node, up: Tensor) -> None:
    value: Tensor = node.meta["val"]
    path = f"{weight_path(node).removesuffix('.weight')}.{UP}"
    with graph.graph.inserting_after(node):
        factor = stored_tensor(graph, node, path, up)
    with graph.graph.inserting_after(factor):
        wide = call(graph, node, _ATEN.matmul.default, (narrow, factor), value)
    with graph.graph.inserting_after(wide):
        total = call(graph, node, _ATEN.add.Tensor, (node, wide), value)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
