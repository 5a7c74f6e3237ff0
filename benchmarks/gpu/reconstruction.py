"""Part ``reconstruction``: quantizing a model of PixArt-XL's width on the GPU, to nearest and by learned rounding."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from benchmarks.gpu.measuring import Run
from fp4dit_ao import AdaRoundConfig, capture, quantizer_for, reconstruct
from fp4dit_ao._compat import pytree
from fp4dit_ao.benchmark.transformers import PIXART_XL, quantized, random_model, sample
from fp4dit_ao.calibration import calibrate

RECIPE = "w4a6_codebook"
ITERATIONS = 50


def measure(run: Run, layers: int = 2, pixels: int = 512, samples: int = 8) -> None:
    """Seconds of every stage."""

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = work()
        if run.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - began
        run.record("reconstruction", {"stage": stage, "layers": layers, "pixels": pixels, "seconds": seconds})
        run.say(f"{stage}: {seconds:.1f} s")
        return result

    model = random_model(PIXART_XL | {"num_layers": layers}, pixels, torch.float32).to(run.device)
    given = [_moved(sample(pixels, torch.float32, PIXART_XL), run.device, seed) for seed in range(samples)]
    timed("to nearest, from capture to lowered graph", lambda: quantized(model, given[0], RECIPE))
    for compiled in (False, True):
        stage = f"{ITERATIONS} iterations a block{', compiled' if compiled else ''}"
        if not run.has_time(stage, 30):
            continue
        prepared = prepare_pt2e(capture(model, given[0]), quantizer_for(model, RECIPE))
        calibrate(prepared, given, progress=False)
        config = AdaRoundConfig(iters=ITERATIONS, compile=compiled)
        with torch.enable_grad():
            report = timed(stage, functools.partial(reconstruct, prepared, given, config, progress=False))
        run.say(report.to_markdown())


def _moved(given: dict[str, Any], device: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given["hidden_states"] = torch.randn(given["hidden_states"].shape, generator=generator)
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), given)
