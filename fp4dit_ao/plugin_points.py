"""Every plug-in point of the package, and the methods that are registered there."""

from collections.abc import Sequence
from typing import Any

from fp4dit_ao.calibration.sample_selection import SELECTIONS
from fp4dit_ao.evaluation.image_metrics import METRICS
from fp4dit_ao.evaluation.prompt_sets import PROMPT_SETS
from fp4dit_ao.observers.scale_search import SEARCHES
from fp4dit_ao.passes.fine_tuning import FINE_TUNINGS
from fp4dit_ao.passes.mixed_precision import ALLOCATIONS
from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS
from fp4dit_ao.passes.reconstruction.scopes import SCOPES
from fp4dit_ao.passes.transforms.registry import TRANSFORMS
from fp4dit_ao.schemes import SCHEMES
from fp4dit_ao.util.markdown import markdown_table
from fp4dit_ao.util.registry import MethodInfo, Registry

POINTS: tuple[Registry[Any], ...] = (
    SELECTIONS, TRANSFORMS, SCHEMES, SEARCHES, ALLOCATIONS, ROUNDINGS, OBJECTIVES, SCOPES, FINE_TUNINGS,
    METRICS, PROMPT_SETS,
)  # fmt: skip
"""Registries of the plug-in points, in the order in which a pipeline meets them."""


def methods(point: str | None = None) -> list[MethodInfo]:
    """The registered methods: point, name, summary, source and cost of each.

    Args:
        point: a plug-in point, such as ``"rounding"``; all of them if None.

    Raises:
        ValueError: there is no such point.
    """
    points = {registry.point: registry for registry in POINTS}
    if point is not None and point not in points:
        raise ValueError(f"unknown plug-in point {point!r}; choose one of {', '.join(points)}")
    chosen = points.values() if point is None else [points[point]]
    return [info for registry in chosen for info in registry.infos()]


def methods_table(infos: Sequence[MethodInfo]) -> str:
    """The methods as a Markdown table."""
    rows = [[info.point, info.name, info.summary, info.source, info.cost] for info in infos]
    return markdown_table(["point", "name", "what it does", "source", "cost"], rows)
