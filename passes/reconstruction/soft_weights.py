"""The soft weights of a step, and the penalty of their gates: one piece of code for a unit, which compiles to a few loops.

A step has two halves of autograd, so that gates are computed once, whatever the unit's graph does with a weight, and forward
and backward of both halves can be compiled apart: the rules make the soft weights, and the unit's graph takes them as leaves.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.reconstruction.rounding import LearnedRounding
from fp4dit_ao.passes.reconstruction.shared_compilation import kind, once_per_structure
from fp4dit_ao.passes.reconstruction.unit_error import Fixed

Makes = Callable[[Sequence["Softened"], Sequence[Tensor], Tensor, Tensor], Sequence[Tensor]]
"""Gives soft weights, and behind them their penalty if it is asked for; see :func:`_results_of`."""


class Softened(nn.Module):
    """A rule's soft weight in the type that products take, and its penalty."""

    def __init__(self, rule: LearnedRounding, dtype: torch.dtype, penalised: bool):
        super().__init__()
        self.rule, self.dtype, self.penalised = rule, dtype, penalised

    def forward(self, weight: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        soft = self.rule(weight).to(self.dtype)
        return (soft, self.rule.regularizer(beta)) if self.penalised else (soft,)


class SoftWeights:
    """Soft weights of all observers of a unit.

    Args:
        rules: one for each observer.
        weights: the originals.
        dtypes: type that each soft weight is made in.
        compiled: whether what makes them is compiled.

    Attributes:
        leaves: what stands in for the observers' rounding.
        beta: exponent of the penalties, a float64 scalar on the device: float32 cannot tell one just above 1 from 1.
        penalty: mean over all weights of the last :meth:`soften`; 0 if it was not asked for.
    """

    def __init__(
        self,
        rules: Mapping[WeightObserver, LearnedRounding],
        weights: Mapping[WeightObserver, Tensor],
        dtypes: Mapping[WeightObserver, torch.dtype],
        compiled: bool,
    ):
        self._weights = [weights[observer] for observer in rules]
        self.leaves = {o: Fixed(weights[o].to(dtypes[o])) for o in rules}
        device = self._weights[0].device
        sizes = [weight.numel() for weight in self._weights]
        self._shares = torch.tensor([size / sum(sizes) for size in sizes], device=device)
        self.beta = torch.full((), 2.0, dtype=torch.float64, device=device)
        self.penalty = torch.zeros((), device=device)
        self._soft: Sequence[Tensor] = ()
        self._reached: list[Tensor] = []
        kinds = (True,) if compiled else (False, True)  # compiling another one takes longer than the penalty
        self._parts = {
            penalised: [Softened(rule, dtypes[o], penalised) for o, rule in rules.items()] for penalised in kinds
        }
        self._make: Makes = _compiled(self._parts[True], self._weights) if compiled else _results_of

    def soften(self, penalised: bool) -> None:
        """Make the soft weights of the parameters as they are, and the penalty, which compiled code makes in any case."""
        penalised = penalised or False not in self._parts
        found = self._make(self._parts[penalised], self._weights, self.beta, self._shares)
        self._soft = found[: len(self._weights)]
        self.penalty = found[-1] if penalised else self._shares.new_zeros(())
        for leaf, soft in zip(self.leaves.values(), self._soft, strict=True):
            leaf.weight = soft.detach().requires_grad_()

    def take_gradients(self) -> list[Tensor]:
        """Take the gradients out of the leaves that got one; which these are, the unit's graph decides, not its rows."""
        self._reached = [leaf.weight for leaf in self.leaves.values() if leaf.weight.grad is not None]
        found = [weight.grad for weight in self._reached if weight.grad is not None]
        for weight in self._reached:
            weight.grad = None
        return found

    def put_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Put others in their places."""
        for weight, gradient in zip(self._reached, gradients, strict=True):
            weight.grad = gradient

    def backward(self, penalty_weight: Tensor) -> None:
        """Pass the gradients of the leaves, and of ``penalty_weight`` (a scalar) times the penalty, on to the parameters."""
        pairs = [(s, leaf.weight.grad) for s, leaf in zip(self._soft, self.leaves.values(), strict=True)]
        pairs.append((self.penalty, penalty_weight))
        wanted = [(value, gradient) for value, gradient in pairs if value.requires_grad and gradient is not None]
        torch.autograd.backward([value for value, _ in wanted], [gradient for _, gradient in wanted])
        self._soft, self._reached, self.penalty = (), [], self.penalty.detach()


def _results_of(parts: Sequence[Softened], weights: Sequence[Tensor], beta: Tensor, shares: Tensor) -> Sequence[Tensor]:
    """Calls all parts, which are penalised or not alike. Not a graph of them, which would hold them in a cycle of references:
    the unit's memory would be free only after the garbage collector's next run."""
    made = [part(weight, beta) for part, weight in zip(parts, weights, strict=True)]
    soft = [one[0] for one in made]
    return [*soft, _average([one[1] for one in made], shares)] if parts[0].penalised else soft


def _compiled(parts: Sequence[Softened], weights: Sequence[Tensor]) -> Makes:
    """:func:`_results_of` under ``torch.compile``, one for all units with rules of these classes on tensors of these kinds.

    The compiler takes tensors that it finds in modules as inputs, and makes another variant where anything else differs.
    """
    graph = Graph()
    arguments = tuple(graph.placeholder(name) for name in ("parts", "weights", "beta", "shares"))
    graph.output(graph.call_function(_results_of, arguments))
    found: Makes = once_per_structure(GraphModule({}, graph), tuple(map(_structure, parts, weights)))
    return found


def _structure(part: Softened, weight: Tensor) -> Hashable:
    tensors = [*part.rule.named_parameters(), *part.rule.named_buffers()]
    return (type(part.rule), part.dtype, kind(weight), *((name, kind(x)) for name, x in tensors))


def _average(penalties: Sequence[Tensor], shares: Tensor) -> Tensor:
    return torch.dot(torch.stack(list(penalties)).float(), shares)
