"""PixArt-XL/2 at its real size, random weights, from float to lowered graph: ``python -m benchmarks.xl``.

Prints seconds and peak memory stage by stage, for nearest rounding, and writes ``xl.json``. Each stage's peak is that of the
whole process so far.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import typer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.step import transformer
from fp4dit_ao import capture, lower, quantizer_for
from fp4dit_ao.environment import environment, one_line
from fp4dit_ao.evaluate import markdown_table, write_text
from fp4dit_ao.families import example_inputs
from fp4dit_ao.inputs import Size


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@torch.no_grad()
def main(recipe: str = "w4a6", layers: int = 28, pixels: int = 1024, out: Path = Path("benchmarks/results")) -> None:
    """Measure and print."""
    stages: list[tuple[str, float, float]] = []
    began = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal began
        stages.append((stage, time.perf_counter() - began, peak_gib()))
        print(f"{stage}: {stages[-1][1]:.1f} s, {stages[-1][2]:.2f} GiB", file=sys.stderr, flush=True)
        began = time.perf_counter()

    done("import")
    model: Any = transformer(layers, pixels)
    parameters = sum(p.numel() for p in model.parameters())
    done("random weights")
    graph: Any = capture(model, example_inputs(model, Size(height=pixels // 8, width=pixels // 8, text=300)))
    done("capture")
    quantizer = quantizer_for(model, recipe)
    del model
    graph = prepare_pt2e(graph, quantizer)
    done("prepare")
    graph = convert_pt2e(graph)
    done("round to nearest, convert")
    graph = lower(graph)
    done("lower")
    total = sum(seconds for stage, seconds, _ in stages if stage not in ("import", "random weights"))
    rows = [[stage, f"{seconds:.1f}", f"{peak:.2f}"] for stage, seconds, peak in stages]
    print(
        markdown_table(
            ["stage", "s", "peak memory, GiB"], [*rows, ["from capture on", f"{total:.1f}", f"{peak_gib():.2f}"]]
        )
    )
    print(f"\n{parameters / 1e6:.0f} M parameters, recipe {recipe}, {pixels} px. {one_line()}")
    result = {"recipe": recipe, "parameters": parameters, "environment": environment(), "stages": stages}
    write_text(out / "xl.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
