""":class:`Family`: the settings of one family of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fp4dit_ao.config import Fields
from fp4dit_ao.families.patterns import KEPT, MODULATION
from fp4dit_ao.families.rewrites import Method
from fp4dit_ao.families.sample_inputs import Inputs

if TYPE_CHECKING:
    from diffusers.configuration_utils import FrozenDict

EIGHT_BIT_MODULATION: dict[str, Fields] = {glob: {"activation": "int8"} for glob in MODULATION}
"""8-bit inputs cost modulation linears little, since there is one vector per image."""


@dataclass(frozen=True)
class Family:
    """Settings of one family of models, a row of ``families.table.FAMILIES``."""

    name: str
    """Name of the family, for reports."""
    transformer: str
    """Name of the diffusers class of its transformer."""
    skip: tuple[str, ...] = KEPT
    """Globs over module names that stay in high precision, beside linears outside of numbered blocks."""
    paper: Fields = field(default_factory=dict)
    """Fields of ``QuantConfig`` that replace those of the paper's recipes."""
    layers: Mapping[str, Fields] = field(default_factory=lambda: EIGHT_BIT_MODULATION)
    """Fields of ``QuantConfig`` that replace those of every recipe, by glob over module names that are not skipped."""
    when: Callable[["FrozenDict"], bool] = lambda config: True
    """Whether a model with this config belongs to the family; tells families of one class apart."""
    sample: Inputs | None = None
    """Makes random keyword arguments of ``forward``; None if unknown."""
    shared: tuple[str, ...] = ()
    """Arguments of ``forward`` that all rows of a batch share, so that their first dimension is not the batch."""
    rewrites: Mapping[str, Method] = field(default_factory=dict)
    """Functions that replace methods while the model is captured, by ``"Class.method"``, beside those of
    ``families.rewrites.REWRITES``."""
