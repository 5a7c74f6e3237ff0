"""Random scenes of the composition model, as tensors: what is drawn where, and the token ids of the prompt.

A scene is a row of five integers: layout, emoji a, b and c (those that the layout does not use are drawn, too), colour.
Everything is table look-ups, so that batches are made on a GPU without waiting for it.
"""

import re
import zlib
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from fp4dit_ao.reference.compositions.layouts import CANVAS, SIDES, SLIDES, SPACING, STEP, Layout, layouts
from fp4dit_ao.reference.compositions.vocabulary import COLOURS, EMOJI, TEXT_LENGTH, plural, with_article

LETTERS = "abc"
MOST_EMOJI = 4
HELD_OUT = 10
"""One in so many pairs of an emoji with another, with itself or with a colour appears in no training picture."""

WORDS = list(EMOJI)
LAYOUTS = layouts()


def is_held_out(first: str, second: str) -> bool:
    """Whether the two words (emoji, or an emoji and a colour) never appear in one training picture.

    It depends on the words alone, so it stays when words are added.
    """
    return zlib.crc32(" ".join(sorted((first, second))).encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class Drawn:
    """What is in the pictures of a batch, ``(n, MOST_EMOJI)`` each."""

    emoji: Tensor
    """Index into :data:`WORDS`."""
    left: Tensor
    """Position in pixels."""
    top: Tensor
    present: Tensor
    big: Tensor
    colour: Tensor
    """Index into ``COLOURS``, ``(n,)``."""


class Scenes(nn.Module):
    """The tables (buffers, so that ``to(device)`` moves them) and what is read from them."""

    pieces: Tensor
    piece_base: Tensor
    piece_letter: Tensor
    letter: Tensor
    left: Tensor
    top: Tensor
    slide: Tensor
    big: Tensor
    cumulative: Tensor
    uses: Tensor
    pairs: Tensor
    held_emoji: Tensor
    held_colour: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        n = len(WORDS)
        forms = [
            [with_article(w) for w in WORDS],
            [with_article(f"big {w}") for w in WORDS],
            [plural(w) for w in WORDS],
        ]
        fixed = sorted({part.strip() for layout in LAYOUTS for part in re.split(r"\{.*?\}", layout.text)} - {""})
        pieces = ["", *(text for form in forms for text in form), *(f"on {colour}" for colour in COLOURS), *fixed]
        ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        width = max(map(len, ids))
        self.register_buffer("pieces", torch.tensor([row + [0] * (width - len(row)) for row in ids]))
        self.end = tokenizer.eos_token_id

        first = {"": 1, "big ": 1 + n, "many ": 1 + 2 * n}
        colours, wording = 1 + 3 * n, 1 + 3 * n + len(COLOURS)
        base, letter = [], []
        for layout in LAYOUTS:
            row = []
            for words, slot in re.findall(r"([^{}]+)|\{(.*?)\}", layout.text):
                if slot:
                    row.append((first[slot[:-1]], 1 + LETTERS.index(slot[-1])))
                elif words.strip():
                    row.append((wording + fixed.index(words.strip()), 0))
            row.append((colours, 4))
            base.append([piece for piece, _ in row])
            letter.append([which for _, which in row])
        self.register_buffer("piece_base", _padded(base))
        self.register_buffer("piece_letter", _padded(letter))

        self.register_buffer(
            "letter", _padded([[1 + LETTERS.index(e) for e, _, _ in x.emoji] for x in LAYOUTS], MOST_EMOJI)
        )
        self.register_buffer("left", _padded([[SPACING * x for _, x, _ in row.emoji] for row in LAYOUTS], MOST_EMOJI))
        self.register_buffer("top", _padded([[SPACING * y for _, _, y in row.emoji] for row in LAYOUTS], MOST_EMOJI))
        self.register_buffer("slide", torch.tensor([layout.slide for layout in LAYOUTS]))
        self.register_buffer("big", torch.tensor([layout.big for layout in LAYOUTS]))
        weights = torch.tensor([layout.weight for layout in LAYOUTS], dtype=torch.float64)
        self.register_buffer("cumulative", (weights.cumsum(0) / weights.sum()).float())

        counts = [[sum(e == which for e, _, _ in x.emoji) for which in LETTERS] for x in LAYOUTS]
        uses = torch.tensor(counts)
        pairs = torch.stack([(uses[:, i] > 0) & (uses[:, j] > (i == j)) for i, j in _PAIRS], 1)
        self.register_buffer("uses", uses > 0)
        self.register_buffer("pairs", pairs)
        held = torch.tensor([[is_held_out(a, b) for b in WORDS] for a in WORDS])
        self.register_buffer("held_emoji", held)
        self.register_buffer("held_colour", torch.tensor([[is_held_out(a, c) for c in COLOURS] for a in WORDS]))

    def sample(self, n: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        """Random scenes ``(n, 5)``: for training, or with at least one combination that no training picture has."""
        device = self.cumulative.device
        tries = 8 * n + 64  # so many that enough of them are wanted ones, without a look at how many are
        draws = torch.rand(tries, 5, generator=generator, device=device)
        layout = torch.searchsorted(self.cumulative, draws[:, 0].contiguous()).clamp(max=len(LAYOUTS) - 1)
        emoji = (draws[:, 1:4] * len(WORDS)).long().clamp(max=len(WORDS) - 1)
        colour = (draws[:, 4] * len(COLOURS)).long().clamp(max=len(COLOURS) - 1)
        scene = torch.cat([layout[:, None], emoji, colour[:, None]], 1)
        wanted = self.distinct(scene) & (self.held_out(scene) == held_out)
        return scene[wanted.logical_not().to(torch.uint8).argsort(stable=True)[:n]]

    def distinct(self, scene: Tensor) -> Tensor:
        """Whether the letters that the layout uses are different emoji: bool ``(n,)``."""
        same = torch.stack([(scene[:, 1 + i] == scene[:, 1 + j]) & (i != j) for i, j in _PAIRS], 1)
        return ~(same & self.pairs[scene[:, 0]]).any(1)

    def held_out(self, scene: Tensor) -> Tensor:
        """Whether the scene has a combination that no training picture has: bool ``(n,)``."""
        emoji, layout = scene[:, 1:4], scene[:, 0]
        together = torch.stack([self.held_emoji[emoji[:, i], emoji[:, j]] for i, j in _PAIRS], 1) & self.pairs[layout]
        coloured = self.held_colour[emoji, scene[:, 4:]] & self.uses[layout]
        return together.any(1) | coloured.any(1)

    def tokens(self, scene: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, int64 ``(n, TEXT_LENGTH)``, as the tokenizer makes them of :func:`prompt`."""
        chosen = torch.cat([torch.zeros_like(scene[:, :1]), scene[:, 1:]], 1)
        piece = self.piece_base[scene[:, 0]] + chosen.gather(1, self.piece_letter[scene[:, 0]])
        ids = self.pieces[piece].flatten(1)
        ids = ids.gather(1, (ids == 0).to(torch.uint8).argsort(dim=1, stable=True))[:, : TEXT_LENGTH - 1]
        length = (ids != 0).sum(1, keepdim=True)
        ids = torch.cat([ids, ids.new_zeros(len(ids), TEXT_LENGTH - ids.shape[1])], 1).scatter(1, length, self.end)
        return ids, (ids != 0).long()

    def place(self, scene: Tensor, generator: torch.Generator) -> Drawn:
        """Random positions of the scene's emoji, among those that its layout allows."""
        n, layout = len(scene), scene[:, 0]
        draws = torch.rand(n, 2, MOST_EMOJI + 1, generator=generator, device=scene.device)
        big = self.big[layout][:, None]
        free = torch.where(big, (CANVAS - SIDES[1]) // STEP + 1, 2)[:, None]
        slid = (draws[..., -1:] * SLIDES).long() * self.slide[layout][..., None]
        moved = (draws[..., :-1] * free).long() + slid
        letter = self.letter[layout]
        chosen = torch.cat([torch.zeros_like(scene[:, :1]), scene[:, 1:]], 1)
        left, top = self.left[layout] + STEP * moved[:, 0], self.top[layout] + STEP * moved[:, 1]
        return Drawn(chosen.gather(1, letter), left, top, letter > 0, big.expand(-1, MOST_EMOJI), scene[:, 4])


_PAIRS = list(combinations_with_replacement(range(len(LETTERS)), 2))


def _padded(rows: list[list[int]], width: int = 0) -> Tensor:
    """Rows of different lengths as one tensor, filled up with zeros."""
    width = max(width, *map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def layout_of(scene: list[int]) -> Layout:
    """Layout of one scene."""
    return LAYOUTS[scene[0]]


def prompt(scene: list[int]) -> str:
    """Text of one scene, such as "a tiger left of a tulip on blue"."""
    layout, *emoji, colour = scene
    words = {letter: WORDS[index] for letter, index in zip(LETTERS, emoji, strict=True)}
    text = LAYOUTS[layout].text
    for letter, word in words.items():
        text = text.replace(f"{{{letter}}}", with_article(word)).replace(f"{{many {letter}}}", plural(word))
        text = text.replace(f"{{big {letter}}}", with_article(f"big {word}"))
    return f"{text} on {list(COLOURS)[colour]}"
