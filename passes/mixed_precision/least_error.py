"""Every layer takes the format with the least error."""

from collections.abc import Sequence

from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, LayerChoices


def least_error(layers: Sequence[LayerChoices], budget_bits: float | None) -> dict[str, str]:
    """The format with the least error in every layer; of equals, the first.

    Raises:
        ValueError: a budget is given, which this allocation cannot keep.
    """
    if budget_bits is not None:
        raise ValueError("allocation 'least_error' keeps no budget; choose 'greedy' or 'integer_programme'")
    return {layer.name: min(layer.choices, key=lambda choice: choice.error).fmt for layer in layers}


ALLOCATIONS.register(
    "least_error", least_error, summary="Each layer takes the candidate format with the least output error.",
    cost="a Gram matrix for each linear",
)  # fmt: skip
