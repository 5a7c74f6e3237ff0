"""Emoji that the reference pipeline draws, read from the npm package (for training) or from one sprite sheet.

Source: ``emoji-datasource-google`` (images: Noto Emoji, Apache License 2.0; metadata: MIT). Get it with
``npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
COLUMNS = 20
CATEGORIES = ("Animals & Nature", "Food & Drink", "Activities")


@dataclass(frozen=True)
class Emoji:
    """One picture and its prompts."""

    name: str
    """Prompt: the Unicode name in lower case, such as ``"tiger face"``."""
    alias: str
    """Second prompt, made from the short name, such as ``"tiger"``."""
    image: np.ndarray
    """Picture on white, uint8 ``(64, 64, 3)``."""


def name_of(row: Mapping[str, object]) -> str:
    """Prompt of one entry of the package's ``emoji.json``."""
    return str(row["name"]).lower().replace("’", "'")


def read_package(package: Path) -> list[Emoji]:
    """Reads the emoji of :data:`CATEGORIES` from an unpacked ``emoji-datasource-google``, in Unicode's own order."""
    rows = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["category"] in CATEGORIES and row["has_img_google"]]
    names = {name_of(row) for row in rows}
    found: dict[str, Emoji] = {}
    for row in sorted(rows, key=lambda row: row["sort_order"]):
        name, alias = name_of(row), row["short_name"].replace("_", " ").replace("-", " ")
        if alias in names or any(character.isdigit() for character in alias):
            alias = name  # "cat" is short for "cat face", and the full name of another picture
        picture = Image.open(package / "img" / "google" / "64" / row["image"]).convert("RGBA").resize((SIZE, SIZE))
        white = Image.new("RGBA", picture.size, "white")
        image = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
        found.setdefault(name, Emoji(name, alias, image))
    return list(found.values())


def write_sheet(emoji: list[Emoji], folder: Path) -> None:
    """Saves the pictures as one sprite sheet ``emoji.png`` and the prompts as ``emoji.json``."""
    rows = -(-len(emoji) // COLUMNS)
    sheet = np.full((rows * SIZE, COLUMNS * SIZE, 3), 255, np.uint8)
    for index, item in enumerate(emoji):
        row, column = divmod(index, COLUMNS)
        sheet[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE] = item.image
    Image.fromarray(sheet).save(folder / "emoji.png", optimize=True)
    texts = [{"name": item.name, "alias": item.alias} for item in emoji]
    (folder / "emoji.json").write_text(json.dumps(texts, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


def read_sheet(folder: Path) -> list[Emoji]:
    """Reads what :func:`write_sheet` saved, in the same order."""
    texts = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    sheet = np.asarray(Image.open(folder / "emoji.png").convert("RGB"))
    emoji = []
    for index, text in enumerate(texts):
        row, column = divmod(index, COLUMNS)
        image = sheet[row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
        emoji.append(Emoji(text["name"], text["alias"], image))
    return emoji
