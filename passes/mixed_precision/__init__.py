"""Mixed precision: which format each layer takes, under a budget of bits."""

from fp4dit_ao.passes.mixed_precision import greedy, integer_programme, least_error  # noqa: F401, they register themselves
from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, Allocation, Choice, LayerChoices
from fp4dit_ao.passes.mixed_precision.format_choice import choose_formats

__all__ = ["ALLOCATIONS", "Allocation", "Choice", "LayerChoices", "choose_formats"]
