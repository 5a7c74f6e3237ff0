"""Drawn images in a folder, one PNG each, so that a run which was interrupted goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fp4dit_ao.evaluation.metrics import Images
from fp4dit_ao.util.atomic_files import whole_file, write_text

SETTINGS = "settings.json"


class KeptImages:
    """Images of one variant: every prompt with every seed, in the order of seeds, then prompts.

    Args:
        parent: folder of all variants' folders.
        variant: name of the variant.
        settings: all that the images depend on, as JSON. Another value of it is another folder.
        seeds: number of seeds.
        prompts: number of prompts.
    """

    def __init__(self, parent: Path, variant: str, settings: Mapping[str, object], seeds: int, prompts: int):
        text = json.dumps({"variant": variant, **settings}, indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        letters = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in variant)
        self.folder = parent / f"{letters.strip('-.')[-40:]}-{digest}"
        self.seeds, self.prompts = seeds, prompts
        if not (self.folder / SETTINGS).exists():
            write_text(self.folder / SETTINGS, text)

    def __len__(self) -> int:
        return self.seeds * self.prompts

    def path(self, seed: int, prompt: int) -> Path:
        """File of the image with these positions."""
        return self.folder / f"{seed:03d}-{prompt:06d}.png"

    def missing(self) -> list[tuple[int, int]]:
        """Positions (seed, prompt) of images that are not drawn yet."""
        there = {path.name for path in self.folder.glob("*.png")}
        every = ((seed, prompt) for seed in range(self.seeds) for prompt in range(self.prompts))
        return [(seed, prompt) for seed, prompt in every if self.path(seed, prompt).name not in there]

    def keep(self, seed: int, prompt: int, image: Images) -> None:
        """Writes one image, uint8 ``(h, w, 3)``, whole or not at all."""
        from PIL import Image

        with whole_file(self.path(seed, prompt)) as partial:
            Image.fromarray(image).save(partial, format="PNG", compress_level=1)

    def read(self, seed: int, prompt: int) -> Images:
        """One image, uint8 ``(h, w, 3)``.

        Raises:
            ValueError: the file is damaged.
        """
        return read_image(self.path(seed, prompt))

    def batches(self, size: int) -> Iterator[tuple[list[tuple[int, int]], Images]]:
        """All images, ``size`` at a time: their positions (seed, prompt), and uint8 ``(size, h, w, 3)``."""
        every = [(seed, prompt) for seed in range(self.seeds) for prompt in range(self.prompts)]
        for start in range(0, len(every), size):
            part = every[start : start + size]
            yield part, np.stack([self.read(*position) for position in part])


def read_image(path: Path) -> Images:
    """An image file as uint8 ``(h, w, 3)``.

    Raises:
        ValueError: the file is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a whole image ({error}); delete it, and start the same run again") from error


def folder_of_images(folder: Path) -> list[Path]:
    """Image files in a folder and its sub-folders, by name.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    kinds = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)
    if not found:
        raise FileNotFoundError(f"there are no images in {folder}; give a folder with .png, .jpg, .webp or .bmp files")
    return found
