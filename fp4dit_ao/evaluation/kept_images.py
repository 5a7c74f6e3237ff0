"""Drawn images in a folder, one PNG each, so that a run which was interrupted goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fp4dit_ao.evaluation.metrics import Images
from fp4dit_ao.util.atomic_files import whole_file, write_text

SETTINGS = "settings.json"
_FRAMES, _MILLISECONDS = "frames", 100
"""Entry of a video's PNG with its number of frames, and how long each is shown."""


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
        """Writes one image, uint8 ``(h, w, 3)``, or video, ``(frames, h, w, 3)``, as PNG, whole or not at all."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        frames = [Image.fromarray(frame) for frame in image.reshape(-1, *image.shape[-3:])]
        about = PngInfo()
        if image.ndim == 4:
            about.add_text(_FRAMES, str(len(frames)))
        with whole_file(self.path(seed, prompt)) as partial:
            frames[0].save(
                partial, format="PNG", compress_level=1, pnginfo=about, save_all=image.ndim == 4,
                append_images=frames[1:], duration=_MILLISECONDS, loop=0,
            )  # fmt: skip

    def read(self, seed: int, prompt: int) -> Images:
        """One image, uint8 ``(h, w, 3)``, or video, ``(frames, h, w, 3)``.

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
    """An image file as uint8 ``(h, w, 3)``; an animated PNG of :meth:`KeptImages.keep` as ``(frames, h, w, 3)``.

    Raises:
        ValueError: the file is no image.
    """
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if _FRAMES not in image.info:
                return np.asarray(image.convert("RGB"))
            wanted, frames = int(image.info[_FRAMES]), []
            for frame in ImageSequence.Iterator(image):  # equal frames that follow each other are one, shown for longer
                times = round(float(frame.info.get("duration", _MILLISECONDS)) / _MILLISECONDS)
                frames += [np.asarray(frame.convert("RGB"))] * max(times, 1)
            return np.stack((frames + frames[-1:] * wanted)[:wanted])
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
