"""The pass that lets an allocation choose the weight formats of a prepared graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.observers.weight import WeightObserver, gram_of, weight_of
from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, Choice, LayerChoices, MeasuredAllocation
from fp4dit_ao.passes.mixed_precision.sensitivity import Trials
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.util.plain_mode import plain_mode


@torch.no_grad()
@plain_mode()
def choose_formats(
    prepared: GraphModule,
    allocation: str = "least_error",
    budget_bits: float | None = None,
    samples: Sequence[Mapping[str, object]] = (),
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, str]:
    """Fixes the format of every weight that has several candidates, in place.

    Args:
        prepared: from ``prepare_pt2e``, calibrated, with candidates in its configs (``QuantConfig.weight_candidates``).
        allocation: a name in ``ALLOCATIONS``.
        budget_bits: largest mean of stored bits per weight, scales included, over these weights; None for no limit.
        samples: keyword arguments of forward calls, for allocations that measure errors of the model's output.
        checkpoint_dir: keep what is measured of each layer there; the same call after a kill goes on from it.
        progress: show a progress bar where errors are measured.

    Returns:
        Names of the chosen formats by names of the linears; empty where no weight has several candidates.

    Raises:
        ValueError: an unknown allocation, a budget that cannot be met, or no samples for an allocation that needs them.
        RuntimeError: the graph was not calibrated.
    """
    allocate = ALLOCATIONS.find(allocation)
    open_layers = {
        observer.name.removesuffix(".weight"): (observer, weight_of(prepared, node), gram_of(prepared, node))
        for node, observer in weight_observers(prepared)
        if not observer.resolved
    }
    if not open_layers:
        return {}
    if isinstance(allocate, MeasuredAllocation):
        weights = {name: (observer, weight) for name, (observer, weight, _) in open_layers.items()}
        chosen = _measured(prepared, weights, allocate, budget_bits, samples, checkpoint_dir, progress)
    else:
        chosen = allocate([_by_gram(name, *found) for name, found in open_layers.items()], budget_bits)
    for name, (observer, weight, _) in open_layers.items():
        observer.choose(next(fmt for fmt in observer.candidates if str(fmt) == chosen[name]), weight)
    return chosen


def _by_gram(name: str, observer: WeightObserver, weight: Tensor, gram: Tensor | None) -> LayerChoices:
    """A layer's choices by the errors of its own output."""
    errors = observer.candidate_errors(weight, gram)
    assert gram is not None  # or candidate_errors would have refused
    power = float(((weight.float() @ gram) * weight.float()).sum())
    return _choices(name, observer, weight, [error / max(power, 1e-30) for error in errors.values()])


def _choices(name: str, observer: WeightObserver, weight: Tensor, errors: Sequence[float]) -> LayerChoices:
    choices = []
    for fmt, error in zip(observer.candidates, errors, strict=True):
        observer.choose(fmt, weight)
        choices.append(Choice(str(fmt), stored_bits(observer, weight), error))
    return LayerChoices(name, weight.numel(), tuple(choices))


def _measured(
    prepared: GraphModule,
    layers: Mapping[str, tuple[WeightObserver, Tensor]],
    allocate: MeasuredAllocation,
    budget_bits: float | None,
    samples: Sequence[Mapping[str, object]],
    checkpoint_dir: str | Path | None,
    progress: bool,
) -> dict[str, str]:
    """The allocation by errors of the model's output with which that errs least."""
    count = min(allocate.samples, len(samples))  # none are refused by Trials
    trials = Trials(prepared, layers, [samples[(2 * i + 1) * len(samples) // (2 * count)] for i in range(count)])
    try:
        groups = {name: allocate.group(name) for name in layers}
        errors = trials.sensitivities(groups, checkpoint_dir, progress)
        found = allocate.candidates([_choices(name, *layers[name], errors[name]) for name in layers], budget_bits)
        return found[0] if len(found) == 1 else min(found, key=trials.error)
    finally:
        set_fake_quantize(prepared, weight=False, activation=False)


def stored_bits(observer: WeightObserver, weight: Tensor) -> float:
    """Bits per weight that an observer's codes and scales take when they are stored: codes of at most 4 bits are packed."""
    assert observer.scale is not None
    codes = weight.numel() * (4 if observer.fmt.bits <= 4 else 8)
    return (codes + 8 * observer.scale.numel() * observer.scale.element_size()) / weight.numel()
