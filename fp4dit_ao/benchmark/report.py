"""Markdown report of a benchmark: bars, linears and their ceilings, steps, generations, peers and failures."""

from collections.abc import Callable, Iterator, Sequence

from fp4dit_ao.benchmark import linears, turns
from fp4dit_ao.benchmark.bars import BARS, Results
from fp4dit_ao.benchmark.ceilings import Rates, Roofline
from fp4dit_ao.benchmark.peers import PEERS
from fp4dit_ao.benchmark.sections import BASE, CALL_SIZE
from fp4dit_ao.benchmark.turns import Measured
from fp4dit_ao.benchmark.verdict import verdict
from fp4dit_ao.benchmark.worker import Case
from fp4dit_ao.evaluation.environment import describe
from fp4dit_ao.util.markdown import markdown_table

_FAILED = "failed"


def markdown(results: Results) -> str:
    """Report of everything that was measured; parts that were not are left out."""
    return "\n\n".join(part for part in _parts(results) if part) + "\n"


def to_dict(results: Results) -> dict[str, object]:
    """All results for JSON, every single time included."""
    lists = {
        name: [m.to_dict() for m in getattr(results, name)] for name in ("linears", "attention", "steps", "generations")
    }
    bars = [dict(zip(("where", "bar", "measured", "met"), bar.row(results), strict=True)) for bar in BARS]
    return {
        "settings": results.settings, "environment": results.environment, "verdict": verdict(results), "bars": bars,
        "ceilings": results.ceilings, **lists,
    }  # fmt: skip


def _parts(results: Results) -> Iterator[str]:
    yield "## Benchmark"
    yield describe(results.environment)
    yield (
        "Speeds are ratios taken round by round, in which every variant has its turn in a process of its own: the median "
        "(lowest to highest), then seconds. An error is the relative L2 distance of the output from float32's, with random "
        "weights and inputs. All variants quantize the same linears; ours quantize q, k and v of attention, too."
    )
    yield "### Bars"
    yield markdown_table(["where", "bar", "measured", "met"], [bar.row(results) for bar in BARS])
    if results.steps:
        layers = max(m.case["layers"] for m in results.steps)
        yield f"Steps are judged on the deepest model measured at their size, here of up to {layers} layers; PixArt-XL has 28."
    if any(m.case != CALL_SIZE for m in results.linears):
        yield "### Linears"
        yield (
            "Speed against bfloat16, eager; median of the rounds. Ours quantize their tokens in the time that is taken. Times "
            f"are of one linear; up to {linears.MOST_LINEARS} of them, with up to {linears.MOST_TOKENS} tokens, are called "
            "together, as in a model, each with a weight and tokens of its own."
        )
        yield from _linear_tables(results)
    if results.attention:
        yield "### Attention"
        yield "Speed against PyTorch's own in bfloat16, guidance batch 2; ours quantize q, k and v in the time that is taken."
        yield _speeds(results.attention, lambda case: "{heads} heads of {dim}, {queries} x {keys}".format(**case))
    if results.ceilings:
        yield "### Ceilings"
        yield _ceilings(results.ceilings)
        yield _rooflines(results)
    yield from _models("One denoising step, PixArt-XL's width", "s / step", results.steps, lambda case: (
        f"{case['pixels']} px, {case['layers']} layers ({case.get('parameters', 0) / 1e6:.0f} M parameters), guidance batch 2"
    ))  # fmt: skip
    yield from _models("A whole generation", "s / batch", results.generations, lambda case: (
        f"{case['model']}, {case['images']} images together"
    ))  # fmt: skip
    yield from _peers(results)


# --- linears ---------------------------------------------------------------------------------------------------------


def _linear_tables(results: Results) -> Iterator[str]:
    by_shape: dict[tuple[int, int], list[Measured]] = {}
    for m in sorted(results.linears, key=lambda m: int(m.case["tokens"])):
        if m.case != CALL_SIZE:
            by_shape.setdefault((m.case["out_features"], m.case["in_features"]), []).append(m)
    for (out, depth), measured in by_shape.items():
        yield f"Weight {out} x {depth}:"
        yield _speeds(measured, lambda case: "1 token" if case["tokens"] == 1 else f"{case['tokens']} tokens")


def _speeds(measured: Sequence[Measured], title: Callable[[Case], str]) -> str:
    """Table with a row per variant and a column per case."""
    columns = list(dict.fromkeys(title(m.case) for m in measured))
    rows = []
    for label in dict.fromkeys(m.variant.label for m in measured):
        own = {title(m.case): m for m in measured if m.variant.label == label}
        facts = [m.facts for m in own.values() if m.error is None]
        errors = [known["error"] for known in facts if "error" in known]
        bits = [known["bits"] for known in facts if "bits" in known]
        rows.append(
            [label, *(_cell(own.get(column)) for column in columns), f"{max(errors):.1e}" if errors else "",
             f"{bits[0]:.2f}" if bits else ""]
        )  # fmt: skip
    return markdown_table(["", *columns, "error", "bits / weight"], rows)


def _cell(m: Measured | None) -> str:
    if m is None:
        return ""
    if m.error is not None:
        return _FAILED
    ratio = m.ratio("bfloat16")
    return f"{str(ratio) + ', ' if ratio else ''}{m.median * 1e3:.3g} ms"


def _ceilings(ceilings: Rates) -> str:
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings["products"].items())
    copies = ", ".join(f"{rate / 1e9:.0f} at {size} MB" for size, rate in ceilings["bytes"].items())
    return (
        f"Best of PyTorch's own large products, in 10⁹ a second: {products} (int8 is `torch._int_mm`; oneDNN's has its "
        "weight laid out beforehand and one scale for all tokens). Copies, in GB/s read and written, by working set: "
        f"{copies}. A linear cannot take less than its products at the best int8 rate, or than its "
        "packed weight and bfloat16 tokens (in and out) at the bandwidth of a working set that large, plus what a call costs "
        f"(ours at {CALL_SIZE['out_features']} x {CALL_SIZE['in_features']}, one token):"
    )


def _rooflines(results: Results) -> str:
    call = next((m.median for m in results.of(results.linears, **CALL_SIZE)), 0.0)
    alone = {_size(m): m for m in results.linears if m.variant.method.endswith(linears.PRODUCT) and m.error is None}
    rows = []
    for m in {_size(m): m for m in results.of(results.linears) if m.case != CALL_SIZE}.values():
        roof = Roofline.of(m.case, m.facts["bytes"], results.ceilings, call)
        product = alone.get(_size(m))
        ratios = [m.ratio(base) for base in (linears.INT_MM.label, linears.ONEDNN.label, "bfloat16", "float32")]
        count = m.case["out_features"] * m.case["in_features"] * m.case["tokens"]
        rows.append(
            [f"{m.case['out_features']} x {m.case['in_features']}", str(m.case["tokens"]),
             *(str(ratio) if ratio else "" for ratio in ratios),
             str(product.ratio(linears.INT_MM.label) or "") if product else "", f"{m.median * 1e3:.3g}",
             f"{count / m.median / 1e9:.0f}", f"{roof.seconds * 1e3:.3g}", f"{roof.seconds / m.median:.0%}", roof.bound]
        )  # fmt: skip
    head = ["weight", "tokens", "speed / _int_mm", "speed / oneDNN int8", "speed / bfloat16", "speed / float32",
            "product alone / _int_mm", "ms",
            "10⁹ products / s", "least ms", "reached", "bound by"]  # fmt: skip
    return markdown_table(head, rows) if rows else ""


def _size(m: Measured) -> tuple[int, int, int]:
    return m.case["out_features"], m.case["in_features"], m.case["tokens"]


# --- models ----------------------------------------------------------------------------------------------------------


def _models(title: str, unit: str, measured: Sequence[Measured], describe: Callable[[Case], str]) -> Iterator[str]:
    if measured:
        yield f"### {title}"
    for case in {str(m.case): m.case for m in measured}.values():
        own = [m for m in measured if m.case == case]
        yield describe(case) + ":"
        head = ["", f"speed against {BASE.label}", unit, "error", "weights, MB", "bits / quantized weight",
                "peak while loading, MB", f"peak of a {unit.removeprefix('s / ')}, MB", "cold first call, s"]  # fmt: skip
        yield markdown_table(head, [_model_row(m, len(head)) for m in own])
    if measured:
        yield (
            "Peaks are above what the process takes with its libraries imported; float weights are mapped from their file, and "
            "count once they are read. The first call compiles, with empty caches; "
            "it is not among the others. Peers load the bfloat16 model, then quantize it."
        )


def _model_row(m: Measured, columns: int) -> list[str]:
    if m.error is not None:
        return [m.variant.label, _FAILED, *[""] * (columns - 2)]
    facts = m.facts
    return [
        m.variant.label, str(m.ratio(BASE.label) or ""), f"{m.median:.3g}", f"{facts['error']:.1e}" if "error" in facts else "",
        f"{facts['bytes'] / 1e6:.1f}", f"{facts['bits']:.2f}", f"{facts['load bytes'] / 1e6:.0f}",
        f"{facts['run bytes'] / 1e6:.0f}", f"{facts['first']:.1f}",
    ]  # fmt: skip


# --- peers -----------------------------------------------------------------------------------------------------------


def _peers(results: Results) -> Iterator[str]:
    """Versions of peers and how each was run, and the failures of all variants."""
    everything = [*results.linears, *results.attention, *results.steps, *results.generations]
    failures: dict[str, dict[str, list[str]]] = {}
    for m in everything:
        if m.error is not None:
            where = turns.describe({key: value for key, value in m.case.items() if key != "parameters"})
            failures.setdefault(m.variant.label, {}).setdefault(m.error, []).append(where)
    rows = []
    for name in results.settings.get("peers", []):
        peer = PEERS[name]
        rows.append([name, f"{peer.package} {peer.version}", f"{peer.dtype}, {peer.mode}" if peer.installed else ""])
    if rows:
        yield "### Peers"
        yield markdown_table(["", "package", "run in"], rows)
    if failures:
        yield "What failed:"
        lines = []
        for label, errors in failures.items():
            for error, cases in errors.items():
                place = cases[0] if len(cases) == 1 else f"{len(cases)} cases, first {cases[0]}"
                lines.append(f"- {label} ({place}): {error}")
        yield "\n".join(lines)
