"""``fp4dit-ao benchmark``: generation timed in turns, so that a busy machine disturbs every variant alike."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp4dit_ao import models
from fp4dit_ao.calibration import read_prompts
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.environment import environment, one_line
from fp4dit_ao.evaluate import generate, markdown_table, write_text
from fp4dit_ao.generation import call_arguments
from fp4dit_ao.pipeline import quantize_pipeline


def benchmark(
    model: str, recipe: str, batch_size: int, steps: int | None, rounds: int, prompts: Path | None, out: Path,
    device: str | None,
) -> None:  # fmt: skip
    """Time ``rounds`` rounds in which float, compiled float and compiled quantized generate one batch each, in turns."""
    config = QuantConfig.from_name(recipe)
    texts = read_prompts(prompts) if prompts else models.default_prompts(model, batch_size)
    texts = [texts[index % len(texts)] for index in range(batch_size)]
    pipe = models.open_pipeline(model, device)
    call: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    original: nn.Module = pipe.transformer
    quantized = quantize_pipeline(pipe, config, prompts=texts, rounding="nearest", samples=8, compile=True, **call)
    variants: dict[str, tuple[Any, nn.Module]] = {
        "float": (pipe, original),
        "float, compiled": (pipe, _compiled(original)),
        f"{recipe}, compiled": (quantized, quantized.transformer),
    }

    def run(name: str) -> float:
        variant, transformer = variants[name]
        object.__setattr__(variant, "transformer", transformer)
        start = time.perf_counter()
        generate(variant, texts, [0], batch_size=batch_size, progress=None, **call)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    warm_up: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    with tqdm(total=len(variants) * (rounds + 1), desc="generations") as bar:
        for name in variants:
            bar.set_postfix_str(f"warm up: {name}")
            warm_up[name] = run(name)
            bar.update()
        for _ in range(rounds):
            for name, measured in times.items():
                bar.set_postfix_str(name)
                measured.append(run(name))
                bar.update()
    sizes = {name: models.size_at_16_bits(transformer) for name, (_, transformer) in variants.items()}
    rows = []
    for name, measured in times.items():
        ratios = [base / own for base, own in zip(times["float"], measured, strict=True)]
        size, bits = sizes[name]
        each = statistics.median(measured) / batch_size
        rows.append(
            [name, f"{bits:.2f}", f"{size / 1e6:.2f}", f"{warm_up[name]:.1f}", f"{each:.3f}",
             f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        )  # fmt: skip
    head = ["", "bits / weight", "MB at 16 bits", "first call, s", "s / image, median", "speed against float"]
    arguments = call_arguments(pipe, **call)
    settings = {
        "model": model, "recipe": recipe, "batch size": batch_size, "rounds": rounds,
        "steps": arguments.get("num_inference_steps", "default"),
    }  # fmt: skip
    print(markdown_table(head, rows))
    print(f"\n{', '.join(f'{key} {value}' for key, value in settings.items())}; whole pipeline, in turns. {one_line()}")
    result = {"settings": settings, "environment": environment(), "first call, s": warm_up, "seconds": times}
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"every time: {out}")


def _compiled(model: nn.Module) -> nn.Module:
    """``model`` under ``torch.compile``; attributes that the pipeline reads come from the original."""
    compiled: nn.Module = torch.compile(model, dynamic=True)  # type: ignore[assignment]
    return compiled
