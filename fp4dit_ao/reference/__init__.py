"""The reference pipeline: a small, trained PixArt-Sigma that draws emoji, and the pictures it was trained on.

Test machines cannot be expected to have the weights of a real diffusion transformer, so this one ships with the
package. Importing this module loads neither torch nor diffusers; a
pipeline that is loaded after it takes its default arguments from ``generation.json``::

    from diffusers import PixArtSigmaPipeline
    from fp4dit_ao import reference

    pipe = PixArtSigmaPipeline.from_pretrained(reference.path())
    image = pipe("tiger face").images[0]
"""

import json
from pathlib import Path

import numpy as np

from fp4dit_ao.reference.data import read_sheet


def path() -> Path:
    """Folder of the pipeline, in diffusers' own layout."""
    return Path(__file__).parent


def prompts() -> list[str]:
    """Names of all trained emoji, in the order of :func:`pictures`."""
    return [row["name"] for row in json.loads((path() / "emoji.json").read_text(encoding="utf-8"))]


def generation() -> dict[str, object]:
    """Default keyword arguments of the pipeline: steps, guidance, size, text length."""
    call: dict[str, object] = json.loads((path() / "generation.json").read_text(encoding="utf-8"))
    return call


def pictures() -> np.ndarray:
    """Real emoji on white, in the order of :func:`prompts`: uint8 ``(n, 64, 64, 3)``."""
    return np.stack([item.image for item in read_sheet(path())])
