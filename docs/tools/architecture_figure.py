"""Draws ``docs/architecture.svg``: ``python docs/tools/architecture_figure.py``.

Rooms and their order are read from the contract in pyproject.toml that CI checks, so that the figure cannot say anything else.
"""

import tomllib
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "architecture.svg"

STAGES = [
    ("capture", "aten graph", "graph_capture"),
    ("transform", "split, smoothed", "passes.transforms"),
    ("prepare_pt2e", "with observers", "quantizer, observers"),
    ("calibrate", "with scales", "calibration"),
    ("reconstruct", "with learned\nrounding", "passes.reconstruction"),
    ("convert_pt2e", "codes, scales,\ndequantize", "observers"),
    ("lower", "low-bit tensors", "passes, tensors"),
    ("torch.compile", "int8, FP8", "kernels"),
]
"""A stage, what the graph is after it, and where its code is."""

DOES = {
    "cli": "the command fp4dit-ao",
    "plugin_points": "methods(): what is registered everywhere",
    "deploy": "exported files, an HTTP server, measurements",
    "diffusers_integration": "pipelines, module form, LoRA",
    "checkpoint": "files; fidelity and plots",
    "calibration": "real denoising trajectories; the pipeline that ships",
    "graph_capture": "nn.Module to graph",
    "passes.reconstruction": "three more passes; models",
    "quantizer": "which edge gets which format; rewriting graphs",
    "schemes": "grouped, block-scaled, …: one object each",
    "passes.transforms": "before quantization",
    "observers": "how an edge is quantized; low-bit tensor subclasses",
    "config": "recipes; arithmetic for each device",
    "ops": "torch.ops.fp4dit_ao",
    "formats": "sets of integers",
    "_compat": "private API of torch and others; registries, files",
}
"""What a level of rooms does, by its first room."""

PLUGS = {
    "passes.reconstruction": "rounding · objective · scope · allocation · fine-tuning · family",
    "passes.transforms": "graph transform",
    "observers": "scale search",
    "checkpoint": "metric · prompt set",
    "calibration": "sample selection",
    "schemes": "quantization scheme",
    "config": "recipe · kernel",
    "formats": "number format",
}
"""Plug-in points, by the first room of their level."""

ORDER, MODEL, NUMBERS = "#e8eaf6", "#c5cae9", "#dcedc8"
INK, QUIET, PLUG = "#1a237e", "#546e7a", "#b71c1c"


def levels() -> list[list[str]]:
    """Rooms from the top down, as pyproject.toml orders them; passes that are single modules stand together as ``passes``."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    found = []
    for layer in layers:
        rooms = [room.strip().removeprefix("fp4dit_ao.") for room in layer.split(":")]
        packages = {"passes.fine_tuning", "passes.mixed_precision", "passes.reconstruction", "passes.transforms"}
        found.append(
            list(dict.fromkeys("passes" if r.startswith("passes.") and r not in packages else r for r in rooms))
        )
    return found


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, fill: str, **font: Any) -> None:
    """A rounded box with its lower left corner at (x, y), and text in its middle."""
    axes.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=fill, edgecolor=INK, linewidth=0.8
    ))  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **font)


def flow(axes: Any, top: float, width: float) -> None:
    """The stages from left to right, what the graph is between them, and the rooms that hold them."""
    axes.text(
        0, top + 0.55, "The flow: every stage takes a GraphModule and gives one", fontsize=11, weight="bold", color=INK
    )
    step = width / len(STAGES)
    for i, (stage, after, room) in enumerate(STAGES):
        x = i * step
        ours = stage not in {"prepare_pt2e", "convert_pt2e", "torch.compile"}
        box(axes, x, top - 0.6, step - 0.3, 0.75, stage, MODEL if ours else "white", fontsize=8.5, family="monospace")
        axes.text(x + (step - 0.3) / 2, top - 0.78, after, ha="center", va="top", fontsize=7.5, color=INK)
        axes.text(
            x + (step - 0.3) / 2, top - 1.45, room, ha="center", va="top", fontsize=7, color=QUIET, style="italic"
        )
        if i + 1 < len(STAGES):
            arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1}
            axes.annotate("", (x + step - 0.02, top - 0.22), (x + step - 0.28, top - 0.22), arrowprops=arrow)


def rooms(axes: Any, top: float, width: float) -> None:
    """The rooms, one level a row."""
    axes.text(
        0,
        top + 0.35,
        "The rooms: each imports from those below it, and from no other",
        fontsize=11,
        weight="bold",
        color=INK,
    )
    axes.text(width, top + 0.35, "plug-in points", fontsize=9, weight="bold", color=PLUG, ha="right")
    found = levels()
    for row, names in enumerate(found):
        y = top - 0.62 * (row + 1)
        fill = NUMBERS if row >= len(found) - 5 else MODEL if row >= len(found) - 10 else ORDER
        share = 8.2 / len(names)
        for i, name in enumerate(names):
            label = name.removeprefix("passes.") if len(names) > 2 else name
            box(axes, i * share, y, share - 0.12, 0.5, label, fill, fontsize=8, family="monospace")
        axes.text(8.3, y + 0.25, DOES[names[0]], va="center", fontsize=8, color=QUIET)
        axes.text(width, y + 0.25, PLUGS.get(names[0], ""), va="center", ha="right", fontsize=8, color=PLUG)


def main() -> None:
    """Write the figure; the same file each time."""
    matplotlib.rcParams.update({"svg.hashsalt": "fp4dit_ao", "svg.fonttype": "none", "font.family": "sans-serif"})
    width, height = 16.0, 3.0 + 0.62 * len(levels()) + 0.6
    figure = Figure(figsize=(width * 0.72, height * 0.72))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set_xlim(-0.1, width + 0.1)
    axes.set_ylim(0, height)
    axes.axis("off")
    flow(axes, height - 0.9, width)
    rooms(axes, height - 3.4, width)
    figure.savefig(OUT, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
