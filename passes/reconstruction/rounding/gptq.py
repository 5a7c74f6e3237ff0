"""GPTQ (arXiv 2210.17323) for any number format: columns in turn, each one's error made good by those that follow.

For the layer's error ``tr(E H E^T)``, ``E = W - W^``, ``H = 2 X^T X``: round column j to the nearest values of its groups'
grids, then move the columns F that are not rounded yet to where they are best given that error (the paper's equation 2),

    W[:, F] -= (W[:, j] - W^[:, j]) / [H_F^-1]_jj * (H_F^-1)[j, F].

All the rows of ``H_F^-1`` that this takes are, up to a factor, those of the upper Cholesky factor U of ``H^-1 = U^T U``
(section 3.3, step 3): ``U[j, j:] / U[j, j]``. Here ``U = R^-1`` with ``H = R R^T``, R upper triangular: one Cholesky
factorisation of H, its rows and columns reversed, and no inverse of H itself. The moves are applied at once within
``block_size`` columns, and to the rest after each such block (step 2). Scales are the observer's, fixed before: a moved
weight may saturate.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao.observers import Grid
from fp4dit_ao.passes.reconstruction.rounding.rule import ClosedFormRounding

MOST_DAMPING = 10.0
"""Give up beyond this multiple of the mean diagonal: the solution would be that of nearest rounding."""


@dataclass(frozen=True)
class GPTQ(ClosedFormRounding):
    """GPTQ's rounding.

    Attributes:
        act_order: round columns in descending order of ``H``'s diagonal (the largest inputs first), rather than from left
            to right. Each column keeps the scales of its original group.
        damping: added to the diagonal, as a multiple of its mean; ten times as much, with a warning, where H is still not
            positive definite.
        block_size: columns between updates of all that follow.
    """

    act_order: bool = False
    damping: float = 0.01
    block_size: int = 128

    @torch.no_grad()
    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None, name: str) -> Tensor:
        assert hessian is not None
        _check(weight, hessian, name)
        order = hessian.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        if order is not None:
            weight, grid, hessian = weight[:, order], grid.columns(order), hessian[order][:, order]
        factor = self._inverse_factor(hessian, name).float()
        codes = self._round_columns(weight.float().clone(), grid, factor)
        return codes if order is None else codes[:, order.argsort()]

    def _inverse_factor(self, hessian: Tensor, name: str) -> Tensor:
        """U, upper triangular, ``U^T U`` the inverse of the damped Hessian."""
        diagonal = hessian.diagonal()
        mean = diagonal.mean()
        if mean <= 0:  # no input at all
            return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        damping = self.damping
        while damping <= MOST_DAMPING:
            damped = hessian + torch.diag((damping * mean).expand(len(hessian)))
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                upper = lower.flip(0, 1)
                identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
                return torch.linalg.solve_triangular(upper, identity, upper=True)
            warnings.warn(
                f"{name}: the Hessian of {len(hessian)} inputs is not positive definite with a damping of {damping:g} of its "
                f"mean diagonal; trying {10 * (damping or 1e-3):g}. More calibration samples would help",
                stacklevel=2,
            )
            damping = 10 * (damping or 1e-3)
        raise ValueError(
            f"{name}: the Hessian of {len(hessian)} inputs is not positive definite with any damping up to {MOST_DAMPING:g} "
            "of its mean diagonal, as every damped X^T X is; check the model's precision"
        )

    def _round_columns(self, weight: Tensor, grid: Grid, factor: Tensor) -> Tensor:
        """Codes; ``weight`` (float32) is used up."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for begin in range(0, weight.shape[1], self.block_size):
            end = min(begin + self.block_size, weight.shape[1])
            errors = torch.empty_like(weight[:, begin:end])
            for j in range(begin, end):
                column = weight[:, j : j + 1]
                here = grid.columns(slice(j, j + 1))
                codes[:, j : j + 1] = here.encode(column)
                error = (column - here.decode(codes[:, j : j + 1])) / factor[j, j]
                weight[:, j + 1 : end] -= error * factor[j, j + 1 : end]
                errors[:, j - begin] = error[:, 0]
            weight[:, end:] -= errors @ factor[begin:end, end:]
        return codes


def _check(weight: Tensor, hessian: Tensor, name: str) -> None:
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"{name}: a Hessian of shape {tuple(hessian.shape)} for a weight of shape {tuple(weight.shape)}; "
            f"expected {(weight.shape[1],) * 2}"
        )
    if not torch.isfinite(hessian).all():
        raise ValueError(
            f"{name}: the Hessian of {len(hessian)} inputs holds NaN or Inf; the inputs overflow, calibrate in a wider type"
        )
