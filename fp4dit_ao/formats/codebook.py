"""Codebooks: formats whose levels are listed, not computed."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao.formats.number_format import MAX_BITS, NumberFormat


@dataclass(frozen=True)
class CodebookFormat(NumberFormat):
    """Format whose levels follow no formula: code i stands for the i-th level, from the lowest up.

    Attributes:
        name: the name that :func:`parse` takes.
        levels: integers, strictly ascending, with 0 among them; a power of two in number, at most 256.

    Raises:
        ValueError: the levels are not ascending, lack 0, or have another number.
    """

    name: str
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not ascending or 0 not in self.levels or 2**self.bits != len(self.levels) or not 1 <= self.bits <= MAX_BITS:
            raise ValueError(
                f"codebook {self.name!r} with {len(self.levels)} levels: a codebook has 2, 4, 8, … or 256 ascending "
                "integers, 0 among them"
            )

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    def level(self, code: int) -> int:
        return self.levels[code]

    @property
    def lattice(self) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.int64)

    @property
    def lattice_max(self) -> int:
        return max(-self.levels[0], self.levels[-1])

    @property
    def level_range(self) -> tuple[int, int]:
        return self.levels[0], self.levels[-1]

    def encode(self, y: Tensor) -> Tensor:
        y = torch.nan_to_num(y.float(), nan=0.0)
        return torch.bucketize(y.contiguous(), torch.tensor(self._thresholds, device=y.device)).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.int()]

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        levels = torch.tensor(self.levels, dtype=torch.float32, device=y.device)
        below = torch.bucketize(y, levels[1:], right=True)
        gaps = levels.diff()
        return levels[below], gaps[below.clamp(max=len(gaps) - 1)]

    @functools.cached_property
    def _thresholds(self) -> list[float]:
        """Boundaries between codes: values above the i-th get code i + 1 or more. Each is the middle between two
        levels, or the float32 just below it where the tie goes up."""
        middles = torch.tensor([(a + b) / 2 for a, b in zip(self.levels, self.levels[1:], strict=False)])
        odd = torch.arange(len(middles)) % 2 == 1
        return torch.where(odd, torch.nextafter(middles, torch.tensor(-math.inf)), middles).tolist()


NF4 = CodebookFormat("nf4", (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127))
"""NF4 (arXiv 2305.14314): quantiles of a normal distribution, times 127 and rounded to int8."""
