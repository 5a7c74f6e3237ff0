"""Bars: promises about speed and size, and whether a benchmark meets them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fp4dit_ao.benchmark import linears
from fp4dit_ao.benchmark.ceilings import Rates
from fp4dit_ao.benchmark.turns import Measured
from fp4dit_ao.benchmark.variants import Variant

PIXART, FLUX = linears.SHAPES["pixart-xl"], linears.SHAPES["flux"]


@dataclass
class Results:
    """All results of a benchmark, complete or not.

    Attributes:
        settings: options of the benchmark; bars are judged on ``settings["recipes"][0]``.
        environment: hardware and versions.
        ceilings: see :class:`fp4dit_ao.benchmark.ceilings.Ceilings`; empty if not measured.
        linears, attention, steps, generations: one entry per variant and case.
    """

    settings: Mapping[str, Any]
    environment: dict[str, str]
    ceilings: Rates = field(default_factory=dict)
    linears: list[Measured] = field(default_factory=list)
    attention: list[Measured] = field(default_factory=list)
    steps: list[Measured] = field(default_factory=list)
    generations: list[Measured] = field(default_factory=list)

    @property
    def ours(self) -> Variant:
        """Variant that bars are judged on."""
        return Variant(self.settings["recipes"][0], "compiled")

    def of(self, measured: Sequence[Measured], **case: object) -> list[Measured]:
        """Entries of our variant that did not fail and whose case has these values, or one of each list of values."""
        wanted = {key: value if isinstance(value, list | range) else [value] for key, value in case.items()}
        return [
            m
            for m in measured
            if m.variant == self.ours and m.error is None and all(m.case.get(k) in v for k, v in wanted.items())
        ]


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        where: hardware and size.
        what: name of the figure.
        limit: least value of every figure; the greatest if ``at_most``.
        figures: takes the figures from results; none if they were not measured.
        needs: text that the environment's ``gpu`` or ``kernel`` must contain for the bar to apply.
        at_most: whether figures must stay below the limit.
    """

    where: str
    what: str
    limit: float
    figures: Callable[[Results], list[float]]
    needs: str = ""
    at_most: bool = False

    def row(self, results: Results) -> list[str]:
        """Cells of the table: where, bar, measured, met."""
        head = [self.where, f"{self.what} {'≤' if self.at_most else '≥'} {self.limit:g}"]
        if self.needs and not any(self.needs in results.environment.get(k, "") for k in ("kernel", "gpu")):
            return [*head, "", f"needs {self.needs}"]
        figures = self.figures(results)
        if not figures:
            return [*head, "", "not measured"]
        worst = max(figures) if self.at_most else min(figures)
        text = f"{worst:.3g}"
        if len(figures) > 1:
            text += f" (median {statistics.median(figures):.3g} of {len(figures)})"
        met = worst <= self.limit if self.at_most else worst >= self.limit
        return [*head, text, "yes" if met else "**no**"]


def _linears(base: str, shapes: list[tuple[int, int]], tokens: range) -> Callable[[Results], list[float]]:
    def figures(results: Results) -> list[float]:
        found = results.of(results.linears, tokens=tokens)
        inside = [m for m in found if (m.case["out_features"], m.case["in_features"]) in shapes]
        return [ratio.median for m in inside if (ratio := m.ratio(base))]

    return figures


def _steps(base: str, pixels: int) -> Callable[[Results], list[float]]:
    def figures(results: Results) -> list[float]:
        found = _deepest(results.of(results.steps, pixels=pixels))
        return [ratio.median for m in found if (ratio := m.ratio(base))]

    return figures


def _deepest(measured: list[Measured]) -> list[Measured]:
    """Entries of the model with the most layers."""
    most = max((m.case["layers"] for m in measured), default=0)
    return [m for m in measured if m.case["layers"] == most]


def _smaller(pixels: int) -> Callable[[Results], list[float]]:
    def figures(results: Results) -> list[float]:
        own = _deepest(results.of(results.steps, pixels=pixels))
        half = [
            m for m in results.steps if own and m.case == own[0].case and m.variant.method == "bfloat16" and not m.error
        ]
        return [half[0].facts["bytes"] / own[0].facts["bytes"]] if own and half else []

    return figures


def _attention(results: Results) -> list[float]:
    return [1 / ratio.median for m in results.of(results.attention) if (ratio := m.ratio("bfloat16"))]


def _facts(name: str) -> Callable[[Results], list[float]]:
    def figures(results: Results) -> list[float]:
        return [m.facts[name] for m in results.linears if m.variant.is_recipe and name in m.facts]

    return figures


_LONG, _SHORT = range(256, 4097), range(1, 17)
_CPU, _AMX = "CPU with AVX512-VNNI", "CPU with AMX"
BARS = [
    Bar(f"{_CPU}, linear, PixArt-XL, 256 to 4096 tokens", "speed / torch._int_mm", 0.95,
        _linears(linears.INT_MM.label, PIXART, _LONG), "avx512vnni"),
    Bar(f"{_CPU}, linear, PixArt-XL, 256 to 4096 tokens", "speed / bfloat16", 1.8,
        _linears("bfloat16", PIXART, _LONG), "avx512vnni"),
    Bar(f"{_CPU}, linear, PixArt-XL, 256 to 4096 tokens", "speed / float32", 3.5,
        _linears("float32", PIXART, _LONG), "avx512vnni"),
    Bar("CPU, linear, PixArt-XL, 1 to 16 tokens", "speed / bfloat16", 1.5,
        _linears("bfloat16", PIXART, _SHORT), "avx512vnni"),
    Bar("CPU, PixArt-XL step, 512 px, compiled", "speed / compiled bfloat16", 1.6,
        _steps("bfloat16, compiled", 512), "avx512vnni"),
    Bar("CPU, PixArt-XL step, 512 px, compiled", "speed / compiled float32", 3.0,
        _steps("float32, compiled", 512), "avx512vnni"),
    Bar(f"{_CPU}, attention with quantized q, k and v, PixArt-XL", "time / bfloat16 attention", 1.1, _attention,
        "avx512vnni", at_most=True),
    Bar(f"{_AMX}, linear, PixArt-XL, 256 to 4096 tokens", "speed / bfloat16", 1.3,
        _linears("bfloat16", PIXART, _LONG), "amx"),
    Bar(f"{_AMX}, PixArt-XL step, 512 px, compiled", "speed / compiled bfloat16", 1.3,
        _steps("bfloat16, compiled", 512), "amx"),
    Bar(f"{_AMX}, attention with quantized q, k and v, PixArt-XL", "time / bfloat16 attention", 1.1, _attention, "amx",
        at_most=True),
    Bar("H200, linear, FLUX, 4096 tokens and more", "speed / bfloat16", 1.4,
        _linears("bfloat16", FLUX, range(4096, 1 << 20)), "H200"),
    Bar("H200, PixArt-XL step, 1024 px, compiled", "speed / compiled bfloat16", 1.2,
        _steps("bfloat16, compiled", 1024), "H200"),
    Bar("H200, PixArt-XL step, 1024 px, compiled", "bfloat16's weight bytes / ours", 3.5, _smaller(1024), "H200"),
    Bar("anywhere, every recipe's linears", "error against float64 on the same quantized operands", 2e-6,
        _facts("deviation"), at_most=True),
    Bar("anywhere, every recipe's linears", "bits per quantized weight", 4.3, _facts("bits"), at_most=True),
]  # fmt: skip
"""All bars; those that need other hardware say so."""
