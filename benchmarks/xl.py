"""Quantizing PixArt-XL/2 at its real size with random weights, stage by stage: ``python -m benchmarks.xl``.

Prints wall-clock seconds, processor seconds and peak memory of every stage, with nearest rounding, and writes
``xl.json``. The peak of a stage is that of the process until then.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
import typer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import MinifloatTensor, capture, lower, quantizer_for
from fp4dit_ao.benchmark.transformers import PIXART_XL, random_model
from fp4dit_ao.evaluation.environment import environment, one_line
from fp4dit_ao.families import example_inputs
from fp4dit_ao.families.sample_inputs import Size
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table


def peak_gib() -> float:
    """Peak resident memory of this process, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@torch.no_grad()
def main(recipe: str = "w4a6", layers: int = 28, pixels: int = 1024, out: Path = Path("benchmarks/results")) -> None:
    """Measures and prints."""
    stages: list[tuple[str, float, float, float]] = []
    began = time.perf_counter(), time.process_time()

    def done(stage: str) -> None:
        nonlocal began
        stages.append((stage, time.perf_counter() - began[0], time.process_time() - began[1], peak_gib()))
        print(f"{stage}: {stages[-1][1]:.1f} s, {stages[-1][3]:.2f} GiB", file=sys.stderr, flush=True)
        began = time.perf_counter(), time.process_time()

    done("import")
    model = random_model(PIXART_XL | {"num_layers": layers}, pixels, torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    done("random weights")
    graph = capture(model, example_inputs(model, Size(height=pixels // 8, width=pixels // 8, text=300)))
    done("capture")
    quantizer = quantizer_for(model, recipe)
    del model
    graph = prepare_pt2e(graph, quantizer)
    done("prepare")
    graph = convert_pt2e(graph, fold_quantize=False)
    done("round to nearest, convert")
    graph = lower(graph)
    done("lower")
    codes = sum(p.numel() for p in graph.parameters() if isinstance(p.detach(), MinifloatTensor))
    rows = [[stage, f"{seconds:.1f}", f"{busy:.1f}", f"{peak:.2f}"] for stage, seconds, busy, peak in stages]
    counted = [stage for stage in stages if stage[0] not in ("import", "random weights")]
    wall, busy = (sum(stage[column] for stage in counted) for column in (1, 2))
    rows.append(["from capture on", f"{wall:.1f}", f"{busy:.1f}", f"{peak_gib():.2f}"])
    print(markdown_table(["stage", "s", "processor, s", "peak memory, GiB"], rows))
    share = f"{codes / parameters:.0%} of them codes"
    print(f"\n{parameters / 1e6:.0f} M parameters, {share}, recipe {recipe}, {pixels} px. {one_line()}")
    result = {
        "recipe": recipe,
        "parameters": parameters,
        "codes": codes,
        "environment": environment(),
        "stages": stages,
    }
    write_text(out / "xl.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
