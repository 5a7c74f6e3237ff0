"""Mixed precision: which format each layer takes, under a budget of bits."""

from fp4dit_ao.passes.mixed_precision import (  # noqa: F401, they register themselves
    greedy,
    integer_programme,
    least_error,
    mixdq,
)
from fp4dit_ao.passes.mixed_precision.allocation import (
    ALLOCATIONS,
    Allocation,
    Choice,
    LayerChoices,
    MeasuredAllocation,
    measures,
)
from fp4dit_ao.passes.mixed_precision.format_choice import choose_formats

__all__ = ["ALLOCATIONS", "Allocation", "Choice", "LayerChoices", "MeasuredAllocation", "choose_formats", "measures"]
