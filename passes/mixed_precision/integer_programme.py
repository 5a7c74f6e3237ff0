"""Allocation by an integer programme: the least total error that the budget allows."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import lil_array  # type: ignore[import-untyped]

from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, LayerChoices, check_budget


def integer_programme(layers: Sequence[LayerChoices], budget_bits: float | None) -> dict[str, str]:
    """Minimises the sum of errors, one choice a layer, under the budget (MixDQ, arXiv 2405.17873, eq. 5), to optimality.

    Raises:
        ValueError: the budget is below what the smallest formats take.
        RuntimeError: the solver fails.
    """
    check_budget(layers, budget_bits)
    flat = [(index, choice) for index, layer in enumerate(layers) for choice in layer.choices]
    if not flat:
        return {}
    errors = np.array([choice.error for _, choice in flat])
    one_each = lil_array((len(layers), len(flat)))
    for column, (index, _) in enumerate(flat):
        one_each[index, column] = 1
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    if budget_bits is not None:
        total = sum(layer.weights for layer in layers)
        share = np.array([[layers[index].weights / total * choice.bits for index, choice in flat]])
        constraints.append(LinearConstraint(share, -np.inf, budget_bits * (1 + 1e-9)))
    scale = float(errors.max()) or 1.0
    found = milp(errors / scale, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=constraints)
    if found.x is None:
        raise RuntimeError(f"the integer programme of the allocation has no solution: {found.message}")
    chosen = {index: choice.fmt for (index, choice), x in zip(flat, found.x, strict=True) if x > 0.5}
    return {layer.name: chosen[index] for index, layer in enumerate(layers)}


ALLOCATIONS.register(
    "integer_programme", integer_programme, summary="Least total error under the budget, by scipy's milp.",
    source="MixDQ, arXiv 2405.17873", cost="a Gram matrix for each linear",
)  # fmt: skip
