"""Pictures of scenes: emoji cut out as stickers with a white edge, on a coloured ground, drawn on any device."""

import numpy as np
import torch
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor, nn

from fp4dit_ao import reference
from fp4dit_ao.reference.compositions.layouts import CANVAS, SIDES
from fp4dit_ao.reference.compositions.scenes import MOST_EMOJI, WORDS, Drawn
from fp4dit_ao.reference.compositions.vocabulary import COLOURS, EMOJI

WHITE = 245
"""Pixels with all channels above this, connected to the edge of the picture, are its ground."""


def cut_out(picture: np.ndarray) -> np.ndarray:
    """Sticker of an emoji on white: RGBA uint8, ``(64, 64, 4)``; opaque where the emoji is, and one pixel around it.

    The white edge hides that the picture has no transparency of its own, and sets emoji off from any ground.
    """
    light = np.pad((picture > WHITE).all(2), 1, constant_values=True)
    regions, _ = ndimage.label(light)
    inside = ndimage.binary_dilation(regions != regions[0, 0])[1:-1, 1:-1]
    alpha = np.where(inside, 255, 0).astype(np.uint8)
    return np.concatenate([picture, alpha[..., None]], 2)


def stickers(side: int) -> Tensor:
    """All emoji of the vocabulary as stickers of that many pixels: float32 ``(n, 4, side, side)``, RGB in [-1, 1] times
    opacity, and opacity."""
    pictures = dict(zip(reference.prompts(), reference.pictures(), strict=True))
    found = []
    for word in WORDS:
        scaled = Image.fromarray(cut_out(pictures[EMOJI[word]])).resize((side, side), Image.Resampling.BOX)
        found.append(torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 255)
    stacked = torch.stack(found)
    opacity = stacked[:, 3:]
    return torch.cat([(2 * stacked[:, :3] - 1) * opacity, opacity], 1)


def colours() -> Tensor:
    """Background colours: float32 ``(n, 3)`` in [-1, 1]."""
    return torch.tensor(list(COLOURS.values())) / 127.5 - 1


class Painter(nn.Module):
    """Draws batches of scenes. Stickers of all sizes lie in one table (a buffer), a row for every pixel."""

    pixels: Tensor
    colours: Tensor

    def __init__(self) -> None:
        super().__init__()
        pixels = [stickers(side).permute(0, 2, 3, 1).reshape(-1, 4) for side in SIDES]
        self.big_from = len(pixels[0])
        self.register_buffer("pixels", torch.cat(pixels))
        self.register_buffer("colours", colours())

    def forward(self, drawn: Drawn) -> Tensor:
        """Pictures in [-1, 1], ``(n, 3, CANVAS, CANVAS)``."""
        along = torch.arange(CANVAS, device=drawn.emoji.device)
        picture = self.colours[drawn.colour][:, None, None]
        for slot in range(MOST_EMOJI):
            big = drawn.big[:, slot, None, None]
            side = torch.where(big, SIDES[1], SIDES[0])
            row = along[:, None] - drawn.top[:, slot, None, None]
            column = along - drawn.left[:, slot, None, None]
            inside = (row >= 0) & (row < side) & (column >= 0) & (column < side) & drawn.present[:, slot, None, None]
            start = torch.where(big, self.big_from, 0) + drawn.emoji[:, slot, None, None] * side * side
            index = torch.where(inside, start + row * side + column, 0)
            pixel = self.pixels[index] * inside[..., None]
            picture = picture * (1 - pixel[..., 3:]) + pixel[..., :3]
        return picture.permute(0, 3, 1, 2).contiguous()
