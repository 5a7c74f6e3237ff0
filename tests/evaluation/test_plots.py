"""Pictures: the right pixels in the right place, and files that are whole or absent."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fp4dit_ao.evaluation import fonts, plots
from fp4dit_ao.formats import FloatFormat


def plain(colour, size=16):
    return np.full((1, size, size, 3), colour, dtype=np.uint8)


def test_a_grid_holds_every_image_in_its_column():
    black, grey = plain(0), plain(128)
    grid = np.asarray(
        plots.comparison({"one": np.concatenate([black, grey]), "two": np.concatenate([grey, black])}, ["a", "b"])
    )
    height, width = grid.shape[:2]
    left, right = width - 2 * 134 + 64, width - 134 + 64
    assert [grid[y, x, 0] for y in (height - 200, height - 70) for x in (left, right)] == [0, 128, 128, 0]


def test_labels_are_drawn():
    with_text = np.asarray(plots.comparison({"variant": plain(255)}, ["prompt"]))
    without = np.asarray(plots.comparison({" ": plain(255)}, [" "]))
    assert (with_text < 255).sum() > (without < 255).sum() == 0


def shapes(text, font):
    """What the font draws for each letter; a letter that it lacks is a box, the same for every one."""
    return [bytes(font.getmask(letter)) for letter in text if not letter.isspace()]


@pytest.mark.parametrize("text", ["кошка", "γάτα", "kočka", "−", "→"])
def test_letters_beyond_latin_1_are_drawn(text):
    [(shown, font)] = fonts.drawable([text], 14)
    assert shown == text
    assert bytes(font.getmask("\ufdd0")) not in shapes(shown, font)


@pytest.mark.parametrize("text", ["中国的猫 in a box", "🦊 fox", "a\u200d\ufe0fb", "\ud800"])
def test_no_label_has_a_box(text, monkeypatch):
    """Where no installed font has a letter, its number is written."""
    for installed in (fonts._installed(), []):
        monkeypatch.setattr(fonts, "_installed", lambda installed=installed: installed)
        fonts._font.cache_clear()
        [(shown, font)] = fonts.drawable([text], 14)
        assert bytes(font.getmask("\ufdd0")) not in shapes(shown, font)
    fonts._font.cache_clear()
    written = {"中": r"\u4e2d\u56fd\u7684\u732b in a box", "🦊": r"\U0001f98a fox"}
    assert shown == written.get(text[0], shown)
    plots.comparison({text: plain(0)}, [text])


def test_the_installed_font_that_has_the_most_letters_is_taken(monkeypatch):
    known = {Path("own"): {97}, Path("b"): {97, 98}, Path("abc"): {97, 98, 99}}
    monkeypatch.setattr(fonts, "_own", lambda: Path("own"))
    monkeypatch.setattr(fonts, "_installed", lambda: [Path("b"), Path("abc")])
    monkeypatch.setattr(fonts, "_letters", lambda path: frozenset(known[path]))
    fonts._font.cache_clear()
    found = {text: fonts._font(frozenset(map(ord, text))) for text in ("a", "ab", "abc", "d")}
    fonts._font.cache_clear()
    assert found == {"a": Path("own"), "ab": Path("b"), "abc": Path("abc"), "d": Path("own")}


@pytest.mark.parametrize("text", ["a red fox in the snow", "кошка на подоконнике", "W" * 40, ""])
def test_labels_stay_in_their_place(text):
    [(shown, font)] = fonts.drawable([text], 14)
    lines = fonts.wrapped(shown, font, 118)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 118 for line in lines)


def test_large_images_are_made_smaller():
    assert plots.comparison({"x": plain(0, 1024)}, ["a"]).width < 700


def test_columns_must_have_one_shape():
    with pytest.raises(ValueError, match="columns of one shape"):
        plots.comparison({"one": plain(0), "two": plain(0, 32)}, ["a"])
    with pytest.raises(ValueError, match="columns of one shape"):
        plots.comparison({"one": plain(0)}, ["a", "b"])


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.png"
    plots.save(plots.comparison({"x": plain(0)}, ["a"]), path)
    assert Image.open(path).format == "PNG"

    class Broken:
        def savefig(self, path, format):
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        plots.save(Broken(), path)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
    assert Image.open(path).format == "PNG"


def test_figures_are_drawn(tmp_path):
    codes = np.arange(16, dtype=np.uint8).repeat(8)
    values = np.random.default_rng(0).normal(size=500)
    for name, figure in {
        "lines": plots.number_lines(["int4", "e2m1", "e3m0"]),
        "histograms": plots.histograms({"a": values, "b": values}, "value", columns=3),
        "levels": plots.level_usage({"fc": ("e2m1", codes), "gelu": ("e3m0", codes), "out": ("e2m1", codes)}),
    }.items():
        plots.save(figure, tmp_path / f"{name}.png")
        assert Image.open(tmp_path / f"{name}.png").width > 200


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4", "e2m3"])
def test_levels_are_counted_once_with_both_zeros_together(name):
    fmt = FloatFormat.parse(name)
    counts = plots._level_counts(fmt, np.arange(2**fmt.bits, dtype=np.uint8))
    assert counts.sum() == 2**fmt.bits
    zero = int((fmt.lattice == 0).nonzero())
    assert counts[zero] == 2
    assert (np.delete(counts, zero) == 1).all()
