"""Part ``step``: one denoising step, compiled by block, as a ratio to the best bfloat16, with bytes and first calls."""

import contextlib
import copy
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from benchmarks.gpu.attention import BACKENDS
from benchmarks.gpu.measuring import Call, Run, alone, error_of, in_turns, kernels, quickest, ratios, timer, within
from fp4dit_ao._compat import pytree
from fp4dit_ao.benchmark.transformers import PIXART_XL, quantized, random_model, ready, sample
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.families import example_inputs
from fp4dit_ao.families.sample_inputs import Size
from fp4dit_ao.util.markdown import markdown_table

BASE = "bfloat16"
METHODS = (BASE, "w4a6_codebook", "torchao FP8", "w4a8_codebook", "w4a6", "torchao INT8")
BEST_BACKEND = "cuDNN"
"""Tried beside PyTorch's own choice."""
FLUX: dict[str, Any] = {
    "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "num_layers": 2, "num_single_layers": 4, "guidance_embeds": True,
}  # fmt: skip
"""FLUX.1's width with fewer blocks: 19 double and 38 single ones would not fit the time."""
LEAST = 15
"""Seconds below which no further variant is prepared."""
Given = dict[str, Any]


def pixart(device: str, layers: int = 28, pixels: int = 1024) -> tuple[nn.Module, Given]:
    """A model of PixArt-XL's shape, and the arguments of a step with guidance."""
    model = random_model(PIXART_XL | {"num_layers": layers}, pixels, torch.bfloat16).to(device)
    return model, pytree.tree_map_only(Tensor, lambda x: x.to(device), sample(pixels, torch.bfloat16, PIXART_XL))


def flux(device: str, pixels: int = 1024, config: Given = FLUX) -> tuple[nn.Module, Given]:
    """A model of FLUX.1's width, and the arguments of a step."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(**config).to(torch.bfloat16).eval().requires_grad_(False)
    given = example_inputs(model, Size(height=pixels // 8, width=pixels // 8, text=512), dtype=torch.bfloat16)
    return model, pytree.tree_map_only(Tensor, lambda x: x.to(device), given)


MODELS: dict[str, Callable[[str], tuple[nn.Module, Given]]] = {
    "PixArt-XL, 1024 px": pixart,
    "FLUX.1, 2 + 4 blocks": flux,
}


def variants() -> list[tuple[str, str | None]]:
    """Methods and attention backends (None: PyTorch's choice, for ours the fastest), most telling first."""
    return [(BASE, None), (METHODS[1], None), (BASE, BEST_BACKEND), *((method, None) for method in METHODS[2:])]


def label(method: str, backend: str | None) -> str:
    """Name of a row."""
    return method if backend is None else f"{method}, {backend} attention"


def measure(run: Run) -> None:
    """A table for each model."""
    asked = {name: make for name, make in MODELS.items() if run.only in name}
    share = (run.until - time.monotonic()) / max(len(asked), 1)
    for number, (name, make) in enumerate(asked.items()):
        last = run.until
        run.until = min(last, time.monotonic() + share) if number + 1 < len(asked) else last
        result = steps(*make(run.device), run)
        run.until = last
        run.record("step", {"model": name, **result})
        run.say(f"\n{name}\n\n{table(result)}\n")


def steps(model: nn.Module, given: Given, run: Run, mode: str = "by block") -> dict[str, Any]:
    """Seconds of a step by every variant, in turns; bytes of weights; seconds of first calls; what was left out and why."""
    timers: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    size: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for method, backend in variants():
        name = label(method, backend)
        if not run.has_time(name, LEAST):
            skipped[name] = "no time left"
            continue
        try:
            began = time.monotonic()
            with within(min(run.until - began, 3600.0)):
                call, size[name] = _step(model, given, Variant(method, mode), backend)  # type: ignore[arg-type]
                timers[name], _ = timer(call, run.device)
            first[name] = time.monotonic() - began
            run.say(f"{name}: {timers[name]() * 1e3:.2f} ms; ready in {first[name]:.0f} s")
        except Exception as error:
            skipped[name] = error_of(error)
            run.record("errors", {"row": name, "traceback": traceback.format_exc()[-4000:]})
            run.say(f"{name}: {skipped[name]}")
        torch.compiler.reset()  # captured calls need no compiled code any more
    settings = {"mode": mode, "rounds": run.rounds}
    with alone(run.lock):
        seconds = in_turns(timers, run.rounds)
    profile = {name: kernels(replay) for name, replay in timers.items()} if run.device == "cuda" else {}
    return {
        "settings": settings,
        "seconds": seconds,
        "first": first,
        "bytes": size,
        "skipped": skipped,
        "kernels": profile,
    }


def _step(model: nn.Module, given: Given, variant: Variant, backend: str | None) -> tuple[Call, int]:
    made = quantized(model, given, variant.method) if variant.is_recipe else copy.deepcopy(model)
    call, facts = ready(made, variant)

    def step() -> Any:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend]), torch.no_grad():
            return call(**given)

    return step, facts["bytes"]


def table(result: dict[str, Any]) -> str:
    """Speeds as ratios to bfloat16 with PyTorch's attention and to the best bfloat16, and bytes."""
    seconds = result["seconds"]
    best = quickest(seconds, lambda name: name.startswith(BASE)) or BASE
    plain, strict = ratios(seconds, BASE), ratios(seconds, best)
    whole = result["bytes"].get(BASE, 0)
    rows = [
        [name, f"{plain.get(name, float('nan')):.2f}", f"{strict.get(name, float('nan')):.2f}",
         f"{whole / result['bytes'][name]:.2f}", f"{statistics.median(taken) * 1e3:.2f}",
         f"{result['bytes'][name] / 1e6:.0f}", f"{result['first'][name]:.0f}"]
        for name, taken in seconds.items()
    ]  # fmt: skip
    head = ["", f"speed against {BASE}", "against the best", "times smaller", "ms / step", "MB", "ready in, s"]
    said = "".join(f"\n{name}: {why}" for name, why in result["skipped"].items())
    return f"{markdown_table(head, rows)}\n\nThe best is {best}.{said}"
