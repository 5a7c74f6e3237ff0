"""Rounding to the nearest value."""

from dataclasses import dataclass

from torch import Tensor

from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.reconstruction.rounding.rule import ClosedFormRounding


@dataclass(frozen=True)
class Nearest(ClosedFormRounding):
    """Every weight alone; ties to the even code. What weight observers do without reconstruction."""

    needs_samples = False
    needs_hessian = False

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None, name: str) -> Tensor:
        return grid.encode(weight)
