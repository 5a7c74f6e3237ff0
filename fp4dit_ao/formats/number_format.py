"""What every low-bit number format is: a finite set of integers, each named by a code."""

from abc import ABC, abstractmethod

from torch import Tensor

MAX_BITS = 8
"""Widest code."""


class NumberFormat(ABC):
    """A finite set of integers, the *levels*; a tensor value is a level times a scale. :func:`parse` makes one of a name."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a code."""

    @abstractmethod
    def level(self, code: int) -> int:
        """The integer that a code stands for (plain Python, the specification of everything below)."""

    @property
    @abstractmethod
    def lattice(self) -> Tensor:
        """int64, ascending, zero once: every level, in steps."""

    @property
    @abstractmethod
    def lattice_max(self) -> int:
        """The largest magnitude of a level: an integer, in steps. An absmax scale puts the largest value there."""

    @property
    def fits_int8(self) -> bool:
        """Whether every level is an int8, so that products run exactly on int8 units."""
        return self.lattice_max <= 127

    @abstractmethod
    def encode(self, y: Tensor) -> Tensor:
        """Codes (uint8) of the levels nearest to ``y`` (any shape, in steps): ties to the even code, saturating, NaN to 0.

        Computed in float32, and exact for every float32: the nearest level, and at the exact middle the even code.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Levels (float32, exact, in steps) of uint8 ``codes``."""

    def round(self, y: Tensor) -> Tensor:
        """The levels nearest to ``y``, float32: ``decode(encode(y))``."""
        return self.decode(self.encode(y))

    @abstractmethod
    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``y`` (float32, in steps, within the levels): the level at or below it, and how far above that the next one is.

        At the highest level, the distance is that to the level below.
        """
