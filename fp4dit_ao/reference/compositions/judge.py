"""What is in a picture: background colour, which emoji, where and how big, by comparing with the real stickers.

No network and nothing learned: the sticker, position and size that explain most of what differs from the background are taken
first, then the best of what is left, until nothing explains enough. So a judgement does not depend on how any model errs.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4dit_ao.reference.compositions.layouts import CANVAS, SIDES, SPACING, STEP, Layout
from fp4dit_ao.reference.compositions.scenes import LAYOUTS, LETTERS, MOST_EMOJI, WORDS
from fp4dit_ao.reference.compositions.stickers import colours, stickers
from fp4dit_ao.reference.compositions.vocabulary import COLOURS

STRIDE = 2
"""Positions that are compared are this far apart, in pixels."""
EXPLAINED = 0.3
"""Least reduction of the squared difference, as a fraction of what the real sticker there would have."""
NEAR = 0.3
"""Largest distance of a pixel from a background colour that it counts for, in RGB from -1 to 1."""
TOLERANCE = STEP
"""Pixels by which an emoji may miss the places that its layout allows."""

ATTRIBUTES = ("emoji", "where", "colour", "count", "all")


@dataclass(frozen=True)
class Sighting:
    """One emoji in a picture."""

    word: str
    left: int
    top: int
    big: bool


@dataclass(frozen=True)
class Seen:
    """What is in one picture."""

    colour: str
    emoji: tuple[Sighting, ...]
    """The clearest first."""


class Judge(nn.Module):
    """Looks at pictures; all stickers of all sizes are buffers, so that ``to(device)`` moves them."""

    colours: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("colours", colours())
        for side in SIDES:
            templates = stickers(side)
            self.register_buffer(f"stickers_{side}", templates)
            rgb, opacity = templates[:, :3].flatten(2), templates[:, 3:].flatten(2)
            from_ground = rgb[None] - opacity[None] * self.colours[:, None, :, None]
            self.register_buffer(f"energy_{side}", from_ground.square().sum((2, 3)))

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> list[Seen]:
        """Sees every picture of a batch ``(n, 3, 64, 64)`` in [-1, 1]."""
        ground = self.ground(pictures)
        shade = self.colours[ground][..., None, None]
        rest = pictures - shade
        sightings: list[list[Sighting]] = [[] for _ in pictures]
        for _ in range(MOST_EMOJI + 1):  # one more than there can be, to see that there are too many
            best = self._clearest(rest, shade, ground)
            for index, (gain, big, word, left, top) in enumerate(best.tolist()):
                if gain > 0:
                    big, word, left, top = int(big), int(word), int(left), int(top)
                    sightings[index].append(Sighting(WORDS[word], left, top, bool(big)))
                    side = SIDES[big]
                    opacity = getattr(self, f"stickers_{side}")[word, 3]
                    rest[index, :, top : top + side, left : left + side] *= 1 - opacity
        names = list(COLOURS)
        return [Seen(names[c], tuple(s)) for c, s in zip(ground.tolist(), sightings, strict=True)]

    def ground(self, pictures: Tensor) -> Tensor:
        """Background of each picture: the colour that most pixels are near, int64 ``(n,)``."""
        distance = (pictures[:, None] - self.colours[:, :, None, None]).square().sum(2).sqrt()
        nearest, index = distance.min(1)
        votes = F.one_hot(index, len(COLOURS)) * (nearest < NEAR)[..., None]
        return votes.flatten(1, 2).sum(1).argmax(1)

    def _clearest(self, rest: Tensor, shade: Tensor, ground: Tensor) -> Tensor:
        """Gain, size, word, left and top of what explains most of ``rest``, ``(n, 5)``; gain 0 if nothing does."""
        # a sticker on this ground is rgb - opacity * shade, so the ground is a fourth channel of the correlation
        channels = torch.cat([rest, -(rest * shade).sum(1, keepdim=True)], 1)
        found = []
        for big, side in enumerate(SIDES):
            energy = getattr(self, f"energy_{side}")[ground][:, :, None, None]
            gain = 2 * F.conv2d(channels, getattr(self, f"stickers_{side}"), stride=STRIDE) - energy
            gain = torch.where(gain > EXPLAINED * energy, gain, 0)
            columns = gain.shape[3]
            value, index = gain.flatten(1).max(1)
            word, place = index // (columns * columns), index % (columns * columns)
            position = [STRIDE * (place % columns), STRIDE * (place // columns)]
            found.append(torch.stack([value, torch.full_like(value, big), word, *position], 1))
        small, large = found
        return torch.where(large[:, :1] > small[:, :1], large, small)


def asked_for(scene: Sequence[int]) -> Counter[str]:
    """Words of the emoji that the scene has, with how many of each."""
    words = dict(zip(LETTERS, scene[1:4], strict=True))
    return Counter(WORDS[words[letter]] for letter, _, _ in LAYOUTS[scene[0]].emoji)


def verdict(scene: Sequence[int], seen: Seen) -> dict[str, float | None]:
    """How well a picture fits the scene of its prompt, by attribute of :data:`ATTRIBUTES`: 0 or 1, None where not asked.

    ``emoji``: the share of those asked for that are there. ``where``: all are there, where (and as big as) the prompt says.
    ``colour``: the background. ``count``: as many emoji as asked for, whichever. ``all``: everything, and nothing else.
    """
    asked, found = asked_for(scene), Counter(sighting.word for sighting in seen.emoji)
    right = (asked & found).total()
    where = None
    layout = LAYOUTS[scene[0]]
    if layout.placed or layout.big:
        words = dict(zip(LETTERS, (WORDS[index] for index in scene[1:4]), strict=True))
        where = float(any(_fits(way, words, seen) for way in _WAYS[layout.text]))
    marks: dict[str, float | None] = {
        "emoji": right / asked.total(),
        "where": where,
        "colour": float(seen.colour == list(COLOURS)[scene[4]]),
        "count": float(found.total() == asked.total()),
    }
    marks["all"] = float(found == asked and marks["colour"] == 1 and where != 0)
    return marks


_WAYS: dict[str, list[Layout]] = defaultdict(list)
"""Arrangements of each wording."""
for _layout in LAYOUTS:
    _WAYS[_layout.text].append(_layout)


def _fits(layout: Layout, words: dict[str, str], seen: Seen) -> bool:
    """Whether every emoji of the layout was seen within :data:`TOLERANCE` of where it may be."""
    clearest = {sighting.word: sighting for sighting in reversed(seen.emoji)}
    wanted = [(clearest.get(words[letter]), (x, y)) for letter, x, y in layout.emoji]
    if not all(sighting is not None and sighting.big == layout.big for sighting, _ in wanted):
        return False
    room = CANVAS - SIDES[1] if layout.big else STEP
    for axis in (0, 1):
        offsets = [(s.left, s.top)[axis] - SPACING * cell[axis] for s, cell in wanted if s is not None]
        if layout.slide[axis]:
            if max(offsets) - min(offsets) > room + 2 * TOLERANCE:
                return False
        elif min(offsets) < -TOLERANCE or max(offsets) > room + TOLERANCE:
            return False
    return True
