"""One linear at a time, beside what else a CPU offers: ``python -m benchmarks.linear``.

Every variant runs once a round, in turns, so that a busy machine disturbs all alike; printed are medians over the rounds, as
ratios to the quantized linear. ``kernel`` is the product alone, of tokens that are quantized already; ``linear`` is what a
model runs: bfloat16 in, tokens quantized in a loop that Inductor fuses, bfloat16 out. ``int8`` is ``torch._int_mm`` at the
same size: int8 weights, int32 out, no scales. Writes ``linear.json`` beside the table.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tqdm import tqdm  # type: ignore[import-untyped]

from fp4dit_ao import FloatFormat, MinifloatTensor
from fp4dit_ao.environment import environment, one_line
from fp4dit_ao.evaluate import markdown_table, write_text
from fp4dit_ao.kernels import native
from fp4dit_ao.kernels.tokens import quantize_tokens

SHAPES = [(1152, 1152), (4608, 1152), (1152, 4608)]
"""(out_features, in_features): PixArt-XL's attention and feed-forward."""


def variants(rows: int, features: int, depth: int, fmt: str, act_fmt: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    torch.compiler.reset()  # each size compiled for itself, as in a model
    torch.manual_seed(0)
    weight, x = torch.randn(features, depth), torch.randn(rows, depth)
    quantized = MinifloatTensor.from_hp(weight.bfloat16(), [1, 128], fmt, act_fmt, torch.float16)
    half, half_weight = x.bfloat16(), weight.bfloat16()
    tokens, token_scale = quantize_tokens(half, act_fmt)
    levels = torch.randint(-60, 61, (features, depth), dtype=torch.int8).T
    table = native.levels(FloatFormat.parse(fmt))
    compiled = torch.compile(F.linear, dynamic=False)
    return {
        "kernel": lambda: torch.ops.fp4dit_ao.int8_linear(
            tokens, token_scale, quantized.qdata, quantized.scale, table, None, torch.bfloat16
        ),
        "linear": lambda: compiled(half, quantized),
        "int8": lambda: torch._int_mm(tokens, levels),
        "bfloat16": lambda: F.linear(half, half_weight),
        "float32": lambda: F.linear(x, weight),
    }


def main(
    tokens: Annotated[str, typer.Option(help="Comma-separated.")] = "1,16,256,1024,4096",
    rounds: int = 15,
    fmt: str = "e2m1",
    act_fmt: str = "e2m3",
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measure and print."""
    counts = [int(count) for count in tokens.split(",")]
    results, rows = [], []
    with torch.inference_mode(), tqdm(total=len(counts) * len(SHAPES) * (rounds + 2), desc="rounds") as bar:
        for features, depth in SHAPES:
            for count in counts:
                timed: dict[str, list[float]] = {}
                running = variants(count, features, depth, fmt, act_fmt)
                for number in range(rounds + 2):
                    for name, call in running.items():
                        began = time.perf_counter()
                        call()
                        if number >= 2:  # the first two warm up
                            timed.setdefault(name, []).append(time.perf_counter() - began)
                    bar.update()
                results.append({"out_features": features, "in_features": depth, "tokens": count, "seconds": timed})
                rows.append([f"{features} x {depth}", str(count), *columns(timed, count * features * depth)])
    head = ["weight", "tokens", "linear, ms", "10⁹ products / s"]
    head += [f"{name} of {base}" for base in ("int8", "bfloat16", "float32") for name in ("kernel", "linear")]
    print(markdown_table(head, rows))
    print(
        f"\nSpeed as a ratio, {fmt} x {act_fmt} on {next(iter(native.kernels()))}, medians of {rounds} rounds. {one_line()}"
    )
    write_text(out / "linear.json", json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


def columns(timed: dict[str, list[float]], products: int) -> list[str]:
    """Cells of one row."""
    median = {name: statistics.median(seconds) for name, seconds in timed.items()}
    cells = [f"{median['linear'] * 1e3:.2f}", f"{products / median['kernel'] / 1e9:.0f}"]
    for base in ("int8", "bfloat16", "float32"):
        for name in ("kernel", "linear"):
            ratios = [b / own for b, own in zip(timed[base], timed[name], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
    return cells


if __name__ == "__main__":
    typer.run(main)
