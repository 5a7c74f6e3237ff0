"""The values that a weight can be rounded to, element by element: what rounding rules work on."""

from typing import NamedTuple

from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.ops import to_scale_dtype


class Bracket(NamedTuple):
    """The two neighbouring levels around every element; all shaped like the weight.

    Attributes:
        position: float32, the weight over its scale, clipped to the levels; in steps.
        low: float32, the largest level not above ``position``; in steps.
        up: float32, the next level, ``low + step``; ``low`` itself at the highest level.
        step: float32, positive, the distance between neighbours at ``low`` (at the highest level: to the one below); in steps.
        low_codes: uint8 codes of ``low``.
        up_codes: uint8 codes of ``up``.
    """

    position: Tensor
    low: Tensor
    up: Tensor
    step: Tensor
    low_codes: Tensor
    up_codes: Tensor


class Neighbours(NamedTuple):
    """The part of a :class:`Bracket` that takes no codes; ``position`` is differentiable in the weight and the scale."""

    position: Tensor
    low: Tensor
    up: Tensor


class Grid:
    """Values ``level * scale`` for every element of one weight; made by :meth:`WeightObserver.grid`.

    Rounding rules ask the grid and never the format, so that a scheme whose groups have formats of their own (codebook groups)
    can give them a subclass: it overrides :meth:`encode`, :meth:`levels`, :meth:`round`, :meth:`position`,
    :meth:`neighbours`, :meth:`bracket` and :meth:`columns`.

    Args:
        fmt: the format of every element.
        scale: float32, shaped like the weight: weight units per step, positive.
        stored: the scales as they are stored, ``(row blocks, column blocks)``, where any positive numbers would do; None where
            they are part of a format (block formats) or were chosen together with something else (codebook groups).
    """

    def __init__(self, fmt: NumberFormat, scale: Tensor, stored: Tensor | None = None):
        self.fmt, self.scale, self.stored = fmt, scale, stored

    def encode(self, weight: Tensor) -> Tensor:
        """uint8 codes of the values nearest to ``weight`` (float, weight units); ties to the even code, saturating."""
        return self.fmt.encode(weight.float() / self.scale)

    def levels(self, codes: Tensor) -> Tensor:
        """The levels (float32, steps) of uint8 ``codes``: equal for codes of equal value, as those of zero and minus zero."""
        return self.fmt.decode(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """The values (float32, weight units) of uint8 ``codes``."""
        return self.levels(codes) * self.scale

    def round(self, weight: Tensor) -> Tensor:
        """The values (float32, weight units) nearest to ``weight``: ``decode(encode(weight))``."""
        return self.fmt.round(weight.float() / self.scale) * self.scale

    def position(self, weight: Tensor) -> Tensor:
        """``weight`` over its scale, clipped to the levels (float32, steps); differentiable in both."""
        lowest, highest = self.fmt.level_range
        return (weight.float() / self.scale).clamp(float(lowest), float(highest))

    def neighbours(self, weight: Tensor) -> Neighbours:
        """:meth:`bracket` without codes, for rules that look at it in every step."""
        position = self.position(weight)
        low, step = self.fmt.bracket(position.detach())
        return Neighbours(position, low, (low + step).clamp(max=float(self.fmt.level_range[1])))

    def rescaled(self, factor: Tensor) -> "Grid":
        """The grid whose stored scales are multiplied by ``factor``.

        Args:
            factor: float32, positive, shaped like :attr:`stored`, which is not None. Scales have its gradient, and the values
                that they will be stored with.
        """
        assert self.stored is not None
        exact = self.stored.float() * factor
        stored = to_scale_dtype(exact.detach(), self.stored.dtype)
        same = exact + (stored.float() - exact).detach()
        rows, columns = (size // count for size, count in zip(self.scale.shape, stored.shape, strict=True))
        return Grid(self.fmt, same.repeat_interleave(rows, 0).repeat_interleave(columns, 1), stored)

    def bracket(self, weight: Tensor) -> Bracket:
        """The two levels between which every element of ``weight`` (float, weight units) lies."""
        position = self.position(weight)
        low, step = self.fmt.bracket(position)
        up = (low + step).clamp(max=float(self.fmt.level_range[1]))
        return Bracket(position, low, up, step, self.fmt.encode(low), self.fmt.encode(up))

    def columns(self, index: slice | Tensor) -> "Grid":
        """The grid of some columns (the last dimension), in the order of ``index`` (a slice, or int64 positions); its scales
        cannot be changed."""
        return Grid(self.fmt, self.scale[..., index])
