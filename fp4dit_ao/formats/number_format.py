"""Base class of low-bit number formats: a finite set of integers, each with a code."""

from abc import ABC, abstractmethod

from torch import Tensor

MAX_BITS = 8
"""Most bits per code: codes are stored as uint8."""
E4M3_BITS, E4M3_MAX = 4, 448
"""Significant bits of E4M3, three of mantissa and the leading one, and its largest number."""
E4M3_STEP = 2.0**-9
"""E4M3's smallest subnormal."""


def is_exact_in_e4m3(value: int) -> bool:
    """Whether hardware FP8 (E4M3) holds an integer."""
    shift = max(0, abs(value).bit_length() - E4M3_BITS)
    return value % (1 << shift) == 0 and abs(value) <= E4M3_MAX


class NumberFormat(ABC):
    """A finite set of integers, the *levels*; a tensor value is a level times a scale. :func:`parse` returns one by
    name."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits per code."""

    @abstractmethod
    def level(self, code: int) -> int:
        """Level of a code, in plain Python: the specification that every other method is tested against."""

    @property
    @abstractmethod
    def lattice(self) -> Tensor:
        """Every level, in steps: int64, ascending, zero once."""

    @property
    @abstractmethod
    def lattice_max(self) -> int:
        """Largest magnitude of a level, in steps. An absmax scale maps a tensor's largest magnitude to it."""

    @property
    @abstractmethod
    def level_range(self) -> tuple[int, int]:
        """Lowest and highest level, in steps: numbers, which compiled code has as constants."""

    @property
    def fits_int8(self) -> bool:
        """Whether every level fits int8, so that products are exact on int8 units."""
        return self.lattice_max <= 127

    @property
    def is_exact_in_e4m3(self) -> bool:
        """Whether hardware FP8 (E4M3) holds every level, so that operands are exact on FP8 units."""
        return all(is_exact_in_e4m3(self.level(code)) for code in range(2**self.bits))

    @abstractmethod
    def encode(self, y: Tensor) -> Tensor:
        """Codes (uint8) of the levels nearest to ``y`` (any shape, in steps): ties to the even code, saturating, NaN to
        0.

        Computed in float32, and exact for every float32: the nearest level, and at the exact middle the even code.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Levels of uint8 ``codes``: float32, exact, in steps."""

    def round(self, y: Tensor) -> Tensor:
        """Levels nearest to ``y`` as float32: ``decode(encode(y))``."""
        return self.decode(self.encode(y))

    @abstractmethod
    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Level at or below ``y``, and the distance from it to the next level above (at the highest level: to the one
        below).

        Args:
            y: float32, in steps, between the lowest and the highest level.
        """
