"""Pictures: images side by side, levels of number formats, histograms, and the levels that weights use."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fp4dit_ao.evaluation import fonts
from fp4dit_ao.formats import CODEBOOK_SETS, CodebookFormat, NumberFormat, parse
from fp4dit_ao.util.atomic_files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_SMALLEST, _LARGEST = 128, 512
"""Smallest and largest side of a shown image, in pixels; images between them keep their size."""
_GAP = 6
_FONT = 14


def comparison(columns: Mapping[str, NDArray[np.uint8]], rows: Sequence[str]) -> "Image":
    """Labelled grid of images: one column per variant, one row per prompt.

    Args:
        columns: images by name of the variant, uint8 ``(rows, h, w, 3)``, all of one shape.
        rows: label of each row.

    Raises:
        ValueError: there are no columns, or their shapes differ.
    """
    from PIL import Image, ImageDraw

    shapes = {name: images.shape for name, images in columns.items()}
    if len(set(shapes.values())) != 1 or next(iter(shapes.values()))[0] != len(rows):
        raise ValueError(f"a grid of {len(rows)} rows needs columns of one shape (rows, h, w, 3), found {shapes}")
    height, width = next(iter(shapes.values()))[1:3]
    factor = min(max(_SMALLEST / min(height, width), 1.0), _LARGEST / max(height, width))
    factor = float(round(factor)) if factor > 1 else factor
    cell_w, cell_h = round(width * factor), round(height * factor)
    label_w, line_h = 130, _FONT + 4
    heads = [(fonts.wrapped(name, font, cell_w), font) for name, font in fonts.drawable(columns, _FONT)]
    head_h = line_h * max(len(lines) for lines, _ in heads) + _GAP
    size = (label_w + len(columns) * (cell_w + _GAP), head_h + len(rows) * (cell_h + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, (text, font) in enumerate(fonts.drawable(rows, _FONT)):
        lines = fonts.wrapped(text, font, label_w - 2 * _GAP)[: max(1, cell_h // line_h)]
        top = head_h + row * (cell_h + _GAP) + (cell_h - line_h * len(lines)) // 2
        draw.multiline_text((_GAP, top), "\n".join(lines), fill="black", font=font, spacing=4)
    resample = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    for column, (images, (lines, font)) in enumerate(zip(columns.values(), heads, strict=True)):
        left = label_w + column * (cell_w + _GAP)
        draw.multiline_text((left, _GAP // 2), "\n".join(lines), fill="black", font=font, spacing=4)
        for row, image in enumerate(images):
            shown = Image.fromarray(image).resize((cell_w, cell_h), resample)
            canvas.paste(shown, (left, head_h + row * (cell_h + _GAP)))
    return canvas


def save(picture: "Image | Figure", path: Path) -> None:
    """Writes a PNG, whole or not at all; the folder is created.

    Raises:
        OSError: the file cannot be written.
    """
    write: Callable[..., None] = getattr(picture, "savefig", None) or picture.save  # type: ignore[union-attr]
    with whole_file(path) as partial:
        write(partial, format="png")


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, height_ratios: Sequence[float] | None = None
) -> tuple["Figure", NDArray[Any]]:
    """Matplotlib figure of a size in inches, without a window, and its axes as an array ``(rows, columns)``."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return canvas, canvas.subplots(rows, columns, squeeze=False, height_ratios=height_ratios)


def number_lines(formats: Sequence[str]) -> "Figure":
    """Levels of each format on a number line, scaled to ±1 (as in the figure of formats of arXiv 2503.15465)."""
    canvas, axes = figure(8, 0.55 * len(formats) + 0.8)
    (ax,) = axes.flat
    for row, name in enumerate(reversed(formats)):
        fmt = parse(name)
        levels = fmt.lattice.double().numpy() / fmt.lattice_max
        ax.plot(levels, np.full(len(levels), row), "|", markersize=18, markeredgewidth=1.2)
        ax.axhline(row, linewidth=0.5, color="lightgrey", zorder=0)
    ax.set_yticks(range(len(formats)), [name.upper() for name in reversed(formats)])
    ax.set(xlabel="value / largest magnitude", ylim=(-0.6, len(formats) - 0.4))
    ax.spines[["top", "right", "left"]].set_visible(False)
    return canvas


def histograms(series: Mapping[str, NDArray[np.generic]], xlabel: str, columns: int = 3, log: bool = True) -> "Figure":
    """Grid of small histograms, one per array (flattened), titled with its name."""
    columns = min(columns, len(series))
    rows = -(-len(series) // columns)
    canvas, axes = figure(3.4 * columns, 2.2 * rows, rows, columns)
    for ax in axes.flat[len(series) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes.flat, series.items(), strict=False):
        ax.hist(np.asarray(values).ravel(), bins=101, log=log)
        ax.set_title(name, fontsize=8)
        ax.set_xlabel(xlabel, fontsize=8)
        ax.tick_params(labelsize=7)
    return canvas


def level_usage(layers: Mapping[str, tuple[str, NDArray[np.uint8]]]) -> "Figure":
    """Frequencies of the levels that weights use: per format, all layers together on top, and each layer below.

    Args:
        layers: (format, codes of any shape), by name of the layer.
    """
    by_format: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, (fmt_name, codes) in layers.items():
        by_format.setdefault(fmt_name, {})[name] = _level_counts(_shown(fmt_name), codes)
    tallest = max(len(group) for group in by_format.values())
    height = min(3.0 + 0.16 * tallest, 40.0)
    canvas, axes = figure(5.5 * len(by_format), height, 2, len(by_format), height_ratios=[2, max(height - 2.6, 1)])
    for column, (fmt_name, group) in enumerate(by_format.items()):
        levels = _shown(fmt_name).lattice.numpy()
        counts = np.stack(list(group.values()))
        top, below = axes[0, column], axes[1, column]
        places = np.arange(len(levels))
        top.bar(places, counts.sum(0) / counts.sum(), width=0.9)
        top.set_title(f"{fmt_name}: {len(group)} layers, {int(counts.sum()):,} weights", fontsize=9)
        top.set_ylabel("fraction", fontsize=8)
        shown = below.imshow(
            counts / counts.sum(1, keepdims=True), aspect="auto", cmap="viridis", interpolation="nearest"
        )
        canvas.colorbar(shown, ax=below, location="bottom", shrink=0.8, label="fraction of the layer's weights")
        below.set_yticks(range(len(group)), list(group), fontsize=5 if len(group) > 12 else 7)
        step = max(1, len(levels) // 16)
        for ax in (top, below):
            ax.set_xticks(places[::step], [str(level) for level in levels[::step]], fontsize=7)
            ax.set_xlim(-0.5, len(levels) - 0.5)
        below.set_xlabel("level, in steps of the group's scale", fontsize=8)
    return canvas


def _shown(name: str) -> NumberFormat:
    """The format ``name``; of a set of codebooks, in which a code has no level of its own, the codes themselves."""
    if name in CODEBOOK_SETS:
        return CodebookFormat(name, tuple(range(2 ** CODEBOOK_SETS[name].bits)))
    return parse(name)


def _level_counts(fmt: NumberFormat, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Number of occurrences of each level of ``fmt.lattice``; +0 and −0 count together."""
    order = {int(level): index for index, level in enumerate(fmt.lattice)}
    place = np.array([order.get(fmt.level(code), 0) for code in range(2**fmt.bits)])
    counts = np.bincount(codes.ravel(), minlength=2**fmt.bits)
    return np.bincount(place, weights=counts, minlength=len(order)).astype(np.float64)
