"""The rounding of one unit: by a rule of either kind, kept only where it lessens the unit's error."""

import time

from tqdm import tqdm

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.observers.weight import Settled
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction import closed_form_rounding
from fp4dit_ao.passes.reconstruction.learned_rounding import Learner
from fp4dit_ao.passes.reconstruction.report import BlockReport
from fp4dit_ao.passes.reconstruction.rounding import ClosedFormRounding, RoundingRule
from fp4dit_ao.passes.reconstruction.unit_error import UnitError


def round_unit(
    error: UnitError, rule: RoundingRule, config: ReconstructionConfig, index: int, bar: tqdm
) -> BlockReport:
    """Round a unit's weights, and keep what is better on all rows: the new codes, or those from before.

    Args:
        error: of the unit; its observers hold codes of an earlier unit, or None for nearest rounding.
        rule: how to round.
        config: how to learn.
        index: position of the unit.
        bar: updated by :func:`steps_of` in all.
    """
    began = time.monotonic()
    earlier = {observer: observer.settled for observer in error.weights}
    before = error.total()
    after, kept = before, "earlier" if any(rounding.codes is not None for rounding in earlier.values()) else "nearest"
    steps = steps_of(error.segment, rule, config)
    if steps and before > 0:
        learned = not isinstance(rule, ClosedFormRounding)
        _assign(_of_first(error, _solve(error, rule, config, index, before, bar)))
        solved = error.total()
        if solved < before:
            after, kept = solved, "learned" if learned else "solved"
        else:
            _assign(earlier)
    else:
        bar.update(steps)
    linears, seconds = len(error.weights), time.monotonic() - began
    return BlockReport(error.segment.name, linears, before, after, _changed(error), kept, seconds)


def steps_of(segment: Segment, rule: RoundingRule, config: ReconstructionConfig) -> int:
    """Steps of the progress bar for a unit: optimisation steps, or weights."""
    return len(segment.observers) if isinstance(rule, ClosedFormRounding) else config.iters


def _solve(
    error: UnitError, rule: RoundingRule, config: ReconstructionConfig, index: int, before: float, bar: tqdm
) -> dict[WeightObserver, Settled]:
    if isinstance(rule, ClosedFormRounding):
        return closed_form_rounding.solve(error, rule, bar)
    return Learner(error, rule, config, index).solve(before, bar)


def _of_first(error: UnitError, roundings: dict[WeightObserver, Settled]) -> dict[WeightObserver, Settled]:
    """The first process's roundings: where processors differ in a last bit, others could have learned something else."""
    take = error.shards.world.of_first
    return {o: Settled(*(None if x is None else take(x) for x in rounding)) for o, rounding in roundings.items()}


def _assign(roundings: dict[WeightObserver, Settled]) -> None:
    for observer, own in roundings.items():
        observer.settle(own)


def _changed(error: UnitError) -> float:
    """Fraction of the weights that are not rounded to nearest: levels are compared, for codes tell minus zero from zero."""
    moved = 0
    for observer, weight in error.weights.items():
        if observer.codes is not None:
            grid = observer.grid(weight)  # with the scale that was kept
            moved += int((grid.levels(observer.codes) != grid.levels(grid.encode(weight))).sum())
    return moved / sum(weight.numel() for weight in error.weights.values())
