"""What the package knows of one family of models: :class:`Family`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fp4dit_ao.config import HIGH_PRECISION
from fp4dit_ao.families.forward_rewrites import Method
from fp4dit_ao.families.sample_inputs import Inputs


@dataclass(frozen=True)
class Family:
    """What the package knows of one family of models."""

    name: str
    transformer: str
    """Name of the diffusers class."""
    skip: tuple[str, ...] = HIGH_PRECISION
    """Globs over module names that stay in high precision."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``QuantConfig`` that the paper's recipes have here."""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By glob over module names: fields that every recipe has there."""
    when: Callable[[Any], bool] = lambda config: True
    """Tells families of one class apart, by the model's config."""
    sample: Inputs | None = None
    """Random keyword arguments of ``forward``."""
    shared: tuple[str, ...] = ()
    """Arguments of ``forward`` that all rows of a batch share, so that their first dimension is not the batch."""
    rewrites: Mapping[str, Method] = field(default_factory=dict)
    """By ``"Class.method"``: code that runs in the method's place while the model is captured."""
