"""One entry of the collection: a small model's config, and a call of its ``forward``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4dit_ao.families.sample_inputs import Random

WIDE = {"num_attention_heads": 2, "attention_head_dim": 32}
"""Two heads of 32: narrow, and still a multiple of every group size from 16 to 64."""

AXES = (8, 12, 12)
"""Channels of a head for each axis of rotary positions."""


@dataclass(frozen=True)
class Small:
    """A narrow, shallow model of one class, and a call of its ``forward``."""

    config: dict[str, Any]
    """Arguments of the class."""
    inputs: Callable[[Random], dict[str, Any]] | None
    """Makes keyword arguments of ``forward``; None for families of the table, which make their own."""


def fraction(random: Random, batch: int = 2) -> Tensor:
    """Time of a denoising step between 0 and 1, for each row of a batch."""
    return (random.whole(1, 1000, batch) / 1000).to(random.dtype)


def step(random: Random, batch: int = 2) -> Tensor:
    """Whole number of a denoising step, for each row of a batch."""
    return random.whole(0, 1000, batch)


def grid(*sides: int) -> Tensor:
    """Positions of all places of a grid, ``(places, axes)``, float32."""
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in sides))


def packed(random: Random, channels: int = 32, axes: int = 3, text: int = 64) -> dict[str, Any]:
    """Arguments that models after FLUX.1 share: packed image tokens, text, and positions of both."""
    ids = grid(1, 4, 4) if axes == 3 else grid(1, 4, 4, 1)
    return {
        "hidden_states": random.normal(2, 16, channels),
        "encoder_hidden_states": random.normal(2, 8, text),
        "timestep": fraction(random),
        "img_ids": ids,
        "txt_ids": torch.zeros(8, axes),
    }


def image(random: Random, channels: int, text: int = 64) -> dict[str, Any]:
    """Arguments that models of unpacked images share."""
    return {
        "hidden_states": random.normal(2, channels, 8, 8),
        "encoder_hidden_states": random.normal(2, 8, text),
        "timestep": step(random),
    }


def video(random: Random, channels: int, text: int = 64, frames: int = 2) -> dict[str, Any]:
    """Arguments that models of videos share, with frames behind channels."""
    return {
        "hidden_states": random.normal(2, channels, frames, 8, 8),
        "encoder_hidden_states": random.normal(2, 8, text),
        "timestep": step(random),
    }
