"""Codebook groups: a weight's groups choose among sixteen codebooks of sixteen levels, and a row has one float.

    W[n, k] = c[n] * T[i[n, k // group_size]][q[n, k]]

The index ``i`` takes the place of a group's scale *and* of its shape: codebooks differ in size and in form. Every level is one
of the 79 integers that int8 and E4M3 both hold exactly, so a product with small integers (E2M3 or INT8 tokens) is one plain
product on int8 and on FP8 units alike, with ``c`` and the token's scale applied after it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao.formats.number_format import is_exact_in_e4m3

BOOKS, LEVELS = 16, 16
"""Codebooks in a set, and levels in a codebook: an index and a code take 4 bits each."""
MAX_LEVEL = 120
"""The largest level of the built-in sets: the largest int8 that has four significant bits."""
EXACT_LEVELS = tuple(value for value in range(-MAX_LEVEL, MAX_LEVEL + 1) if is_exact_in_e4m3(value))
"""The 79 integers up to 120 that int8 and E4M3 (four significant bits) both hold."""

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4 (arXiv 2305.14314, appendix E)."""
_E2M1, _E3M0, _E1M2 = (0, 1, 2, 3, 4, 6, 8, 12), (0, 1, 2, 4, 8, 16, 32, 64), (0, 1, 2, 3, 4, 5, 6, 7)


@dataclass(frozen=True)
class CodebookSet:
    """Sixteen codebooks that the groups of a weight choose among.

    Attributes:
        name: what configs and checkpoints call it.
        books: sixteen tuples of sixteen int8 levels, ascending; a level that is repeated (shapes with fewer than sixteen) is
            always given the first of its codes.

    Raises:
        ValueError: they are not, or -128 is among them, which has no opposite.
    """

    name: str
    books: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.books) != BOOKS or any(len(book) != LEVELS for book in self.books):
            sizes = sorted({len(book) for book in self.books})
            raise ValueError(
                f"codebook set {self.name!r} has {len(self.books)} codebooks with {', '.join(map(str, sizes))} levels; "
                f"expected {BOOKS} with {LEVELS} each"
            )
        for place, book in enumerate(self.books):
            if list(book) != sorted(book) or not all(isinstance(level, int) and abs(level) <= 127 for level in book):
                raise ValueError(
                    f"codebook {place} of set {self.name!r} is {book}; expected ascending integers from -127 to 127"
                )

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Bits per code."""
        return (LEVELS - 1).bit_length()

    @property
    def largest(self) -> int:
        """The largest magnitude of a level."""
        return max(abs(level) for book in self.books for level in (book[0], book[-1]))

    @functools.cached_property
    def is_exact_in_e4m3(self) -> bool:
        """Whether FP8 units hold every level."""
        return all(is_exact_in_e4m3(level) for book in self.books for level in book)

    def tensor(self, device: torch.device | None = None) -> Tensor:
        """int8 ``(16, 16)``: what each code stands for, by codebook."""
        return torch.tensor(self.books, dtype=torch.int8, device=device)

    @functools.cached_property
    def thresholds(self) -> Tensor:
        """float32 ``(16, 15)``: a value above the i-th has a code of more than i.

        The middle between levels, or the float32 below it where a tie goes up to an even code; of equal levels, the threshold
        after the last, so that only the first code is given.
        """
        return torch.tensor([_thresholds(book) for book in self.books])

    def encode(self, y: Tensor, index: Tensor) -> Tensor:
        """uint8 codes of the levels nearest to ``y``: ties to the even code, saturating, NaN to 0.

        Args:
            y: float ``(rows, columns)``, in steps.
            index: uint8 ``(rows, groups)``; groups divide the columns.

        Returns:
            uint8, shaped like ``y``.
        """
        groups = torch.nan_to_num(y.float(), nan=0.0).reshape(*index.shape, -1)
        codes = torch.zeros(groups.shape, dtype=torch.uint8, device=y.device)
        for threshold in self.thresholds.to(y.device)[index.int()].unbind(-1):
            codes += groups > threshold[..., None]
        return codes.reshape(y.shape)

    def decode(self, codes: Tensor, index: Tensor) -> Tensor:
        """float32 levels of uint8 ``codes`` ``(rows, columns)`` with the codebooks ``index`` ``(rows, groups)``."""
        return levels_of(codes, index, self.tensor(codes.device))

    def bracket(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The neighbouring levels around ``y``, as codes, and their distance.

        Args:
            y: float32 ``(rows, columns)``, in steps, within the levels of its codebook.
            index: uint8 ``(rows, groups)``; groups divide the columns.

        Returns:
            uint8 codes of the largest level not above ``y`` and of the next one (the same at the largest level), and float32
            distances between neighbours (at the largest level: to the one below).
        """
        groups, books = y.reshape(*index.shape, -1), index.int()
        below = torch.zeros(groups.shape, dtype=torch.int32, device=y.device)
        for level in self.tensor(y.device).float()[books].unbind(-1)[1:]:
            below += groups >= level[..., None]
        place = below + LEVELS * books[..., None]
        first, after, gap = (part.to(y.device).flatten()[place].reshape(y.shape) for part in self._neighbours)
        return first, after, gap

    @functools.cached_property
    def _neighbours(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each code of each codebook, ``(16, 16)``: its level's first code, the next level's, and the distance to that."""
        first, after, gap = [], [], []
        for book in self.books:
            above = [next((code for code in range(LEVELS) if book[code] > level), LEVELS - 1) for level in book]
            below = [max((other for other in book if other < level), default=level) for level in book]
            first.append([book.index(level) for level in book])
            after.append([book.index(book[code]) for code in above])
            gap.append([book[a] - level or level - b for a, b, level in zip(above, below, book, strict=True)])
        return (
            torch.tensor(first, dtype=torch.uint8),
            torch.tensor(after, dtype=torch.uint8),
            torch.tensor(gap, dtype=torch.float32),
        )


def levels_of(codes: Tensor, index: Tensor, codebooks: Tensor) -> Tensor:
    """float32 levels ``(rows, columns)``.

    Args:
        codes: uint8 ``(rows, columns)``.
        index: uint8 ``(rows, groups)``, each group's codebook; groups divide the columns.
        codebooks: ``(16, 16)``, what each code stands for.
    """
    groups = codes.unflatten(1, (index.shape[1], -1)).int()
    return codebooks.float().flatten()[groups + LEVELS * index.int()[..., None]].flatten(1)


def _thresholds(book: Sequence[int]) -> list[float]:
    """Fifteen; a value above the i-th has a code of more than i. See :attr:`CodebookSet.thresholds`."""
    thresholds = [math.inf] * (LEVELS - 1)
    for code in reversed(range(LEVELS - 1)):
        above = next((other for other in range(code, LEVELS) if book[other] > book[code]), None)
        if above is None:
            continue
        middle = torch.tensor((book[code] + book[above]) / 2)
        upward = above % 2 == 0 and book.index(book[code]) % 2 == 1
        thresholds[code] = float(torch.nextafter(middle, torch.tensor(-math.inf)) if upward else middle)
    return thresholds


def _nearest(values: Sequence[float]) -> tuple[int, ...]:
    """Each value's nearest of :data:`EXACT_LEVELS`; of two equally near, the smaller magnitude."""
    return tuple(min(EXACT_LEVELS, key=lambda level: (abs(level - value), abs(level))) for value in values)


def _symmetric(magnitudes: Sequence[int], size: float) -> tuple[int, ...]:
    """A codebook of magnitudes with both signs, the largest ``size``; zero has two codes."""
    positive = _nearest([magnitude * size / magnitudes[-1] for magnitude in magnitudes])
    return (*(-level for level in reversed(positive)), *positive)


def _mirrored(shape: Sequence[float], sizes: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """The shape at every size, then the mirror image of each."""
    books = [_nearest([value * size for value in shape]) for size in sizes]
    return (*books, *(tuple(-level for level in reversed(book)) for book in books))


_OCTAVE_EIGHTHS = [MAX_LEVEL * 2 ** (-step / 8) for step in range(BOOKS)]

NF4_GROUPS = CodebookSet("nf4_groups", _mirrored(_NF4, [MAX_LEVEL * 0.88**step for step in range(BOOKS // 2)]))
"""The default: NF4 at eight sizes and the mirror image of each."""
E2M1_GROUPS = CodebookSet("e2m1_groups", tuple(_symmetric(_E2M1, size) for size in _OCTAVE_EIGHTHS))
"""E2M1's shape at sixteen sizes, an eighth of an octave apart: the paper's format without a float scale for each group."""
E3M0_GROUPS = CodebookSet("e3m0_groups", tuple(_symmetric(_E3M0, size) for size in _OCTAVE_EIGHTHS))
"""E3M0's shape likewise."""
E1M2_GROUPS = CodebookSet("e1m2_groups", tuple(_symmetric(_E1M2, size) for size in _OCTAVE_EIGHTHS))
"""E1M2's shape, which is INT4's, likewise."""
