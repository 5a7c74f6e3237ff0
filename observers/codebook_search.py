"""The search for codebook groups: a row's scale, and the codebook of every group, by squared error, of weights or of outputs.

For each of some candidates for a row's scale, the best codebook of every group; then the candidate with the least error of the
row; then the least-squares scale for the codes that this gives, and the best codebooks for it, as long as that helps.

The error of rounding one weight depends only on the quotient of weight and scale, so it is looked up for all sixteen codebooks
at once: a table with a row for every sixteenth of a step, summed over a group by ``embedding_bag``. A weight of 1152 x 4608
takes some 3 s of processor time; binary searches over sorted groups take many times that.

A weight's error counts as often as its input's mean square says, if that is given: the error of outputs, but for what two
inputs have in common (the diagonal of ``tr(E G E^T)``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import CodebookSet
from fp4dit_ao.formats.codebook_groups import BOOKS
from fp4dit_ao.ops import divided

CANDIDATES = torch.linspace(0.65, 1.1, 10).tolist()
"""Fractions of the scale that puts a row's largest magnitude on the largest level."""
REFINEMENTS = 2
"""Rounds of least-squares scales after the candidates."""
_BINS = 16
"""Rows of the table for each step. Quotients are rounded to them, which moves a group's error by 1e-4 of itself."""
_SPAN = 200
"""Steps on each side of zero that the table covers; what lies outside is as wrong as what is at the end. 120 / 0.65 = 185."""
_CHUNK = 2**21
"""Weights that are searched at once: some 30 MB of intermediates."""


def search(
    weight: Tensor, codebooks: CodebookSet, group_size: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scales and codebooks with (about) the least squared error of rounding to nearest.

    Args:
        weight: float ``(out_features, in_features)``, finite.
        codebooks: that groups choose among.
        group_size: input features that share a codebook; divides ``in_features``.
        importance: float32 ``(in_features,)``, how often each input's error counts; None for once.

    Returns:
        float32 ``(out_features,)``, positive, and uint8 ``(out_features, in_features / group_size)``.
    """
    errors = _Errors(codebooks, weight.device, group_size, importance)
    found = [_search_rows(rows, codebooks, errors) for rows in _chunks(weight, group_size)]
    scales, indices = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(indices)


def best_books(
    weight: Tensor, scale: Tensor, codebooks: CodebookSet, group_size: int, importance: Tensor | None = None
) -> Tensor:
    """The codebook of every group with the least squared error at fixed row scales: uint8 ``(out_features, groups)``.

    Of equals, the first. Arguments are those of :func:`search`.
    """
    errors = _Errors(codebooks, weight.device, group_size, importance)
    parts = zip(_chunks(weight, group_size), scale.split(_rows_at_once(weight)), strict=True)
    return torch.cat([errors.of(rows, part).argmin(-1).to(torch.uint8) for rows, part in parts])


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _CHUNK // max(1, weight.shape[1]))


def _chunks(weight: Tensor, group_size: int) -> Iterator[Tensor]:
    """float32 ``(rows, groups, group_size)``."""
    for rows in weight.detach().split(_rows_at_once(weight)):
        yield rows.float().unflatten(1, (-1, group_size))


def _table(codebooks: CodebookSet) -> Tensor:
    """float32 ``(2 * span + 1, 16)``: squared error of rounding each quotient, in steps, by codebook."""
    y = torch.arange(-_SPAN * _BINS, _SPAN * _BINS + 1, dtype=torch.float32) / _BINS
    rows = y.expand(BOOKS, -1)
    every = torch.arange(BOOKS, dtype=torch.uint8)[:, None]
    return (codebooks.decode(codebooks.encode(rows, every), every) - rows).square().T.contiguous()


class _Errors:
    """Squared errors of groups with every codebook.

    Args:
        codebooks: that groups choose among.
        device: of the weights.
        group_size: input features that share a codebook.
        importance: see :func:`search`.
    """

    def __init__(self, codebooks: CodebookSet, device: torch.device, group_size: int, importance: Tensor | None):
        self.table = _table(codebooks).to(device)
        self.importance = None if importance is None else importance.to(device).unflatten(0, (-1, group_size))

    def of(self, groups: Tensor, scale: Tensor) -> Tensor:
        """float32 ``(rows, groups, 16)``, in steps squared, of weights ``(rows, groups, group_size)`` at scales ``(rows,)``."""
        bins = groups / scale[:, None, None] * _BINS
        bins = bins.round_().clamp_(-_SPAN * _BINS, _SPAN * _BINS).add_(_SPAN * _BINS).int()
        counts = None if self.importance is None else self.importance.expand(groups.shape).flatten(0, 1)
        summed = F.embedding_bag(bins.flatten(0, 1), self.table, mode="sum", per_sample_weights=counts)
        return summed.unflatten(0, groups.shape[:2])

    def counted(self, x: Tensor) -> Tensor:
        """``x`` ``(rows, in_features)``, each as often as it counts."""
        return x if self.importance is None else x * self.importance.flatten()


def _search_rows(groups: Tensor, codebooks: CodebookSet, errors: _Errors) -> tuple[Tensor, Tensor]:
    limits = torch.finfo(torch.float32)
    base = divided(groups.abs().amax((1, 2)), codebooks.largest).clamp(limits.tiny / min(CANDIDATES), limits.max)
    best = _judged(groups, base, base, errors)
    for fraction in CANDIDATES:
        best = best.or_better(_judged(groups, base * fraction, base, errors))
    for _ in range(REFINEMENTS):
        y = groups.flatten(1) / best.scale[:, None]
        levels = codebooks.decode(codebooks.encode(y, best.books), best.books)
        power = errors.counted(levels.square()).sum(1).clamp(min=limits.tiny)
        fitted = best.scale * (errors.counted(y * levels).sum(1) / power)
        fitted = torch.where(fitted > limits.tiny, fitted, best.scale)
        best = best.or_better(_judged(groups, fitted, base, errors))
    return best.scale, best.books


class _Choice(NamedTuple):
    """Scales ``(rows,)``, codebooks ``(rows, groups)``, and the squared error of each row in units of its own."""

    scale: Tensor
    books: Tensor
    error: Tensor

    def or_better(self, other: "_Choice") -> "_Choice":
        wins = other.error < self.error
        return _Choice(
            torch.where(wins, other.scale, self.scale),
            torch.where(wins[:, None], other.books, self.books),
            torch.where(wins, other.error, self.error),
        )


def _judged(groups: Tensor, scale: Tensor, unit: Tensor, errors: _Errors) -> _Choice:
    """The best codebooks at row scales, and the rows' errors in ``unit`` squared, so that nothing over- or underflows."""
    best = errors.of(groups, scale).min(-1)
    return _Choice(scale, best.indices.to(torch.uint8), best.values.sum(1) * (scale / unit).square())
