"""The search for codebook groups: a row's scale, and the codebook of every group, by squared error.

For each of some candidates for a row's scale, the best codebook of every group; then the candidate with the least error of the
row; then the least-squares scale for the codes that this gives, and the best codebooks for it, as long as that helps.

The error of rounding one weight depends only on the quotient of weight and scale, so it is looked up for all sixteen codebooks
at once: a table with a row for every sixteenth of a step, summed over a group by ``embedding_bag``. A weight of 1152 x 4608
takes some 3 s of processor time; binary searches over sorted groups take many times that.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import CodebookSet
from fp4dit_ao.formats.codebook_groups import BOOKS

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


def search(weight: Tensor, codebooks: CodebookSet, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales and codebooks with (about) the least squared error of rounding to nearest.

    Args:
        weight: float ``(out_features, in_features)``, finite.
        codebooks: that groups choose among.
        group_size: input features that share a codebook; divides ``in_features``.

    Returns:
        float32 ``(out_features,)``, positive, and uint8 ``(out_features, in_features / group_size)``.
    """
    table = _table(codebooks).to(weight.device)
    found = [_search_rows(rows, codebooks, table) for rows in _chunks(weight, group_size)]
    scales, indices = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(indices)


def best_books(weight: Tensor, scale: Tensor, codebooks: CodebookSet, group_size: int) -> Tensor:
    """The codebook of every group with the least squared error at fixed row scales: uint8 ``(out_features, groups)``.

    Of equals, the first.
    """
    table = _table(codebooks).to(weight.device)
    parts = zip(_chunks(weight, group_size), scale.split(_rows_at_once(weight)), strict=True)
    return torch.cat([_errors(rows, part, table).argmin(-1).to(torch.uint8) for rows, part in parts])


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


def _errors(groups: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """Squared error of every group with every codebook, float32 ``(rows, groups, 16)``, in weight units."""
    bins = groups * (_BINS / scale)[:, None, None]
    bins = bins.round_().clamp_(-_SPAN * _BINS, _SPAN * _BINS).add_(_SPAN * _BINS).int()
    summed = F.embedding_bag(bins.flatten(0, 1), table, mode="sum").unflatten(0, groups.shape[:2])
    return summed * scale.square()[:, None, None]


def _search_rows(groups: Tensor, codebooks: CodebookSet, table: Tensor) -> tuple[Tensor, Tensor]:
    limits = torch.finfo(torch.float32)
    base = (groups.abs().amax((1, 2)) / float(codebooks.largest)).clamp(limits.tiny / min(CANDIDATES), limits.max)
    scale, index, least = base, torch.zeros(groups.shape[:2], dtype=torch.uint8, device=groups.device), None
    for fraction in CANDIDATES:
        scale, index, least = _better(groups, base * fraction, table, scale, index, least)
    for _ in range(REFINEMENTS):
        codes = codebooks.encode(groups.flatten(1) / scale[:, None], index)
        levels = codebooks.decode(codes, index)
        power = levels.square().sum(1)
        fitted = (groups.flatten(1) * levels).sum(1) / power.clamp(min=1)
        fitted = torch.where(fitted > limits.tiny, fitted, scale)
        scale, index, least = _better(groups, fitted, table, scale, index, least)
    return scale, index


def _better(
    groups: Tensor, candidate: Tensor, table: Tensor, scale: Tensor, index: Tensor, least: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, codebooks, error) of each row: the candidate's where its error is less than ``least``."""
    best = _errors(groups, candidate, table).min(-1)
    error, books = best.values.sum(1), best.indices.to(torch.uint8)
    if least is None:
        return candidate, books, error
    wins = error < least
    return (
        torch.where(wins, candidate, scale),
        torch.where(wins[:, None], books, index),
        torch.where(wins, error, least),
    )
