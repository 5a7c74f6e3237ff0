"""The reference pipeline: a small, trained PixArt-Sigma that draws emoji, and the pictures it was trained on.

No weights of a real diffusion transformer can be assumed on a test machine, so this one travels with the package.
Importing this module loads neither torch nor diffusers::

    from diffusers import PixArtSigmaPipeline
    from fp4dit_ao import reference

    pipe = PixArtSigmaPipeline.from_pretrained(reference.path())
    image = pipe("tiger face", **reference.generation()).images[0]
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fp4dit_ao.reference.data import read_sheet


def path() -> Path:
    """The pipeline folder, in diffusers' own layout."""
    return Path(__file__).parent


def prompts() -> list[str]:
    """The name of every trained emoji, in the order of :func:`pictures`."""
    return [row["name"] for row in json.loads((path() / "emoji.json").read_text(encoding="utf-8"))]


def generation() -> dict[str, Any]:
    """Keyword arguments with which the pipeline is meant to be called: steps, guidance, size, text length."""
    call: dict[str, Any] = json.loads((path() / "generation.json").read_text(encoding="utf-8"))
    return call


def pictures() -> np.ndarray:
    """uint8 ``(n, 64, 64, 3)``: the real emoji, on white, in the order of :func:`prompts`."""
    return np.stack([item.image for item in read_sheet(path())])
