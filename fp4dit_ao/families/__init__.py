"""Model families: the table, and the recipe, quantizer and example inputs that it gives a model."""

from fp4dit_ao.families.family import Family
from fp4dit_ao.families.lookup import example_inputs, family_of, quantizer_for, recipe_for
from fp4dit_ao.families.table import FAMILIES

__all__ = ["FAMILIES", "Family", "example_inputs", "family_of", "quantizer_for", "recipe_for"]
