"""Ways in which a prompt arranges emoji, as a table: wording, and where each emoji goes.

A cell is one of 3 x 3 places. Every emoji moves by up to one step of :data:`STEP` pixels from its cell, independently in
both directions, and a layout may slide as a whole; so a prompt has many pictures, as prompts of real models have.
"""

import itertools
from dataclasses import dataclass
from typing import TypeAlias

CANVAS = 64
"""Side of a picture, in pixels."""
SIDES = (28, 52)
"""Sides of an emoji, small and big, in pixels."""
STEP = 4
"""Positions are multiples of this, in pixels."""
SPACING = 16
"""Distance of neighbouring cells, in pixels."""
SLIDES = CANVAS // STEP // 2 + 1
"""Steps that a layout may slide: from one edge to the other, the step of each emoji left out."""

PLACES = {
    "in the middle": (1, 1), "at the top": (1, 0), "at the bottom": (1, 2), "on the left": (0, 1), "on the right": (2, 1),
    "at the top left": (0, 0), "at the top right": (2, 0), "at the bottom left": (0, 2), "at the bottom right": (2, 2),
}  # fmt: skip
"""Column and row of the cell of each place."""
CORNERS = {words: cell for words, cell in PLACES.items() if 1 not in cell}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction from the second to the first, as columns and rows."""


Emoji: TypeAlias = tuple[tuple[str, int, int], ...]
"""Letter, column and row of each emoji of an arrangement."""


@dataclass(frozen=True)
class Layout:
    """One arrangement of one wording."""

    kind: str
    """Name of the group in reports."""
    text: str
    """Wording; ``{a}`` is "a tiger", ``{big a}`` "a big tiger", ``{many a}`` "tigers". The colour follows it."""
    emoji: Emoji
    weight: float
    """Share among the training pictures, not normalised."""
    slide: tuple[int, int] = (0, 0)
    """Whether the layout slides along x and along y."""
    big: bool = False
    placed: bool = True
    """Whether the wording says where the emoji are."""


def _rows(
    kind: str, text: str, arrangements: list[Emoji], weight: float, slide: tuple[int, int] = (0, 0), placed: bool = True
) -> list[Layout]:
    """A layout for every arrangement of one wording; they share its weight."""
    return [Layout(kind, text, emoji, weight / len(arrangements), slide, placed=placed) for emoji in arrangements]


def _corners(letters: str) -> list[Emoji]:
    """Every way of putting the letters into different corners; equal letters are interchangeable."""
    ways = itertools.permutations(CORNERS.values(), len(letters))
    return sorted({tuple(sorted((letter, *cell) for letter, cell in zip(letters, way, strict=True))) for way in ways})


def _relation(relation: str, first: str, second: str) -> list[Emoji]:
    """Every way of putting ``first`` on its side of ``second``; of two on a side, one has each end of it."""
    across, down = RELATIONS[relation]
    ways: list[Emoji] = []
    for ends in itertools.permutations((0, 2)) if len(first) == 2 else [(0,)]:
        for other in (0, 1, 2) if len(first) == 2 else (0,):
            cells = [(letter, 1 + across, 1 + down, end) for letter, end in zip(first, ends, strict=True)]
            cells.append((second, 1 - across, 1 - down, other))
            ways.append(tuple((e, end if down else x, end if across else y) for e, x, y, end in cells))
    return ways


def layouts() -> list[Layout]:
    """All layouts, in a fixed order."""
    found: list[Layout] = []
    for words, cell in PLACES.items():
        found += _rows("one", f"{{a}} {words}", [(("a", *cell),)], 1.5 / 9)
    found.append(Layout("big", "{big a}", (("a", 0, 0),), 0.5, big=True, placed=False))
    for relation, (across, down) in RELATIONS.items():
        slide = (abs(down), abs(across))
        found += _rows("two", f"{{a}} {relation} {{b}}", _relation(relation, "a", "b"), 3 / 4, slide=slide)
        found += _rows("three", f"{{a}} and {{b}} {relation} {{c}}", _relation(relation, "ab", "c"), 2 / 4)
    for (first, cell), (second, other) in itertools.permutations(CORNERS.items(), 2):
        found += _rows("corners", f"{{a}} {first} and {{b}} {second}", [(("a", *cell), ("b", *other))], 2 / 12)
    for count, word in ((2, "two"), (3, "three"), (4, "four")):
        found += _rows("count", f"{word} {{many a}}", _corners("a" * count), 1.5 / 3, placed=False)
    for count, word in ((2, "two"), (3, "three")):
        found += _rows(
            "count and one", f"{word} {{many a}} and {{b}}", _corners("a" * count + "b"), 1.5 / 2, placed=False
        )
    return found
