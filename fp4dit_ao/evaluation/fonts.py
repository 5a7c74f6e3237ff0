"""Fonts of labels in pictures: matplotlib's own, one of the system's for scripts that it lacks, and escapes for the rest."""

import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont


def drawable(texts: Iterable[str], size: int) -> "list[tuple[str, FreeTypeFont]]":
    """Each text as it can be drawn, and the font to draw it with.

    That is DejaVu Sans, which comes with matplotlib, if it has all letters (Latin, Greek, Cyrillic, Arabic and more); else the
    installed font that has the most of them. A letter that the font lacks is written as Python does: ``\\u4e2d``.

    Args:
        texts: labels.
        size: height in pixels.
    """
    from PIL import ImageFont

    found = []
    for text in texts:
        wanted = {ord(letter) for letter in text if letter.isprintable() and not letter.isspace()}
        path = _font(frozenset(wanted))
        known = _letters(path)
        shown = "".join(letter if ord(letter) in known else _escaped(letter) for letter in text)
        found.append((shown, ImageFont.truetype(path, size)))
    return found


def wrapped(text: str, font: "FreeTypeFont", width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _escaped(letter: str) -> str:
    """A letter that the font lacks, as text; nothing for a mark on the letter before, or what has no shape."""
    if letter.isspace():
        return " "
    visible = letter.isprintable() and not unicodedata.category(letter).startswith("M")
    return letter.encode("ascii", "backslashreplace").decode() if visible else ""


@functools.cache
def _font(wanted: frozenset[int]) -> Path:
    """The font that has the most of these letters, DejaVu Sans before others."""
    own = _own()
    if wanted <= _letters(own):
        return own
    return max([own, *_installed()], key=lambda path: len(wanted & _letters(path)))


def _own() -> Path:
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _installed() -> list[Path]:
    """Scalable fonts of the system, by name."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(path for path in map(Path, findSystemFonts()) if path.suffix.lower() in (".ttf", ".otf", ".ttc"))


@functools.cache
def _letters(path: Path) -> frozenset[int]:
    """Code points that a font file has; none if it cannot be drawn from, such as one of pictures alone."""
    from matplotlib.ft2font import FT2Font
    from PIL import ImageFont

    try:
        ImageFont.truetype(path, 12)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
