"""The pass that lets an allocation choose the weight formats of a prepared graph."""

import torch
from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.observers.weight import WeightObserver, gram_of, weight_of
from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, Choice, LayerChoices
from fp4dit_ao.passes.partition import weight_observers


@torch.no_grad()
def choose_formats(
    prepared: GraphModule, allocation: str = "least_error", budget_bits: float | None = None
) -> dict[str, str]:
    """Fixes the format of every weight that has several candidates, in place.

    Args:
        prepared: from ``prepare_pt2e``, calibrated, with candidates in its configs (``QuantConfig.weight_candidates``).
        allocation: a name in ``ALLOCATIONS``.
        budget_bits: largest mean of stored bits per weight, scales included, over these weights; None for no limit.

    Returns:
        Names of the chosen formats by names of the linears; empty where no weight has several candidates.

    Raises:
        ValueError: an unknown allocation, or a budget that cannot be met.
        RuntimeError: the graph was not calibrated.
    """
    allocate = ALLOCATIONS.find(allocation)
    layers: list[LayerChoices] = []
    observers: dict[str, tuple[WeightObserver, Tensor, dict[str, NumberFormat]]] = {}
    for node, observer in weight_observers(prepared):
        if observer.resolved:
            continue
        weight, gram = weight_of(prepared, node), gram_of(prepared, node)
        errors = observer.candidate_errors(weight, gram)
        assert gram is not None  # or candidate_errors would have refused
        power = float(((weight.float() @ gram) * weight.float()).sum())
        name = observer.name.removesuffix(".weight")
        choices = []
        for fmt, error in errors.items():
            observer.choose(fmt, weight)
            choices.append(Choice(str(fmt), stored_bits(observer, weight), error / max(power, 1e-30)))
        layers.append(LayerChoices(name, weight.numel(), tuple(choices)))
        observers[name] = observer, weight, {str(fmt): fmt for fmt in errors}
    chosen = allocate(layers, budget_bits)
    for name, (observer, weight, formats) in observers.items():
        observer.choose(formats[chosen[name]], weight)
    return chosen


def stored_bits(observer: WeightObserver, weight: Tensor) -> float:
    """Bits per weight that an observer's codes and scales take when they are stored: codes of at most 4 bits are packed."""
    assert observer.scale is not None
    codes = weight.numel() * (4 if observer.fmt.bits <= 4 else 8)
    return (codes + 8 * observer.scale.numel() * observer.scale.element_size()) / weight.numel()
