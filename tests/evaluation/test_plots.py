"""Pictures: the right pixels in the right place, and files that are whole or absent."""

import numpy as np
import pytest
from PIL import Image

from fp4dit_ao.evaluation import plots
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


@pytest.mark.parametrize("text", ["кошка", "γάτα", "kočka", "−", "→"])
def test_letters_beyond_latin_1_are_drawn(text):
    """A letter that the font lacks is a box, the same for every one."""
    images = np.zeros((1, 128, 128, 3), np.uint8)
    letter = np.asarray(plots.comparison({"x": images}, [text[0]]))
    assert (letter != np.asarray(plots.comparison({"x": images}, ["\ufdd0"]))).any()


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
