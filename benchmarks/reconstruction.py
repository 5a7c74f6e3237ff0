"""Time and memory of reconstruction, compared with a plain eager loop: ``python -m benchmarks.reconstruction``.

Both learn the rounding of the same block from the same calibration rows, one iteration of each in turns, so that load
on the machine affects both alike. The eager loop is the straightforward implementation: modules that round softly
through autograd, fake quantization by logarithm and floor, stock Adam. Peak memory is that of a process that runs one
of the two.

Writes ``reconstruction.json`` beside the table.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from tqdm import tqdm

from benchmarks.eager_reconstruction import EagerLoop
from fp4dit_ao import AdaRoundConfig, capture, collect_samples, quantizer_for, reconstruct, reference
from fp4dit_ao._compat import cpu_multiplies_bfloat16, pytree
from fp4dit_ao.benchmark import memory
from fp4dit_ao.evaluation.environment import environment, one_line
from fp4dit_ao.families import recipe_for
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import engine as reconstruct_pass
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

BLOCK = "transformer_blocks.0"
PROFILED = 5
"""Steps of the eager loop whose operators are timed."""
PRODUCT = re.compile(r"^aten::(mm|addmm|bmm|baddbmm)$|scaled_dot_product")
"""Operators that multiply matrices."""
FIRST_STEPS = "first steps"
VARIANTS: dict[str, dict[str, bool] | None] = {
    "eager loop": None,
    "reconstruct": {"bfloat16": False},
    "reconstruct, compiled": {"bfloat16": False, "compile": True},
    "reconstruct, bfloat16": {"bfloat16": True},
    "reconstruct, bfloat16, compiled": {"bfloat16": True, "compile": True},
}
"""Settings by name; the eager loop, which is float32, has none. Products in bfloat16 are left out where a CPU emulates them."""


class Turns:
    """Replaces a progress bar in order to time the iterations between calls of ``update``, in turns with ``other``."""

    def __init__(self, other: Callable[[], None] | None, total: int):
        self.other, self.own_seconds, self.other_seconds = other, list[float](), list[float]()
        self.bar = tqdm(total=total, desc="iterations")
        self.began = time.perf_counter()

    def update(self, n: int = 1) -> None:
        self.own_seconds.append(_now() - self.began)
        if self.other is not None:
            began = _now()
            self.other()
            self.other_seconds.append(_now() - began)
        self.bar.update(n)
        self.began = _now()

    def set_postfix_str(self, text: str) -> None:
        self.bar.set_postfix_str(text)

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pixart_xl_block() -> tuple[nn.Module, list[dict[str, Any]]]:
    """Model of PixArt-XL's width with one block and random weights, and samples of 256 tokens and 120 text tokens."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_layers=1, sample_size=32, caption_channels=256, use_additional_conditions=False
    )
    samples = [
        {
            "hidden_states": torch.randn(2, 4, 32, 32),
            "encoder_hidden_states": torch.randn(2, 120, 256),
            "timestep": torch.tensor([500, 500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        for _ in range(4)
    ]
    return model.eval(), samples


def reference_block(rows: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Reference transformer, and calibration samples of batch 2, as with guidance."""
    from diffusers import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(reference.path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.transformer, collect_samples(
        pipe, reference.prompts()[:16], samples=rows // 2, **reference.generation()
    )


def prepare(model: nn.Module, samples: list[Any], recipe: str, device: str) -> tuple[GraphModule, list[Any]]:
    model.to(device)
    data = [pytree.tree_map_only(Tensor, lambda x: x.to(device), sample) for sample in samples]
    with torch.no_grad():
        return prepare_pt2e(capture(model, data[0]), quantizer_for(model, recipe)), data


def measure(
    model: nn.Module, samples: list[Any], config: AdaRoundConfig, recipe: str, device: str, variant: str, both: bool
) -> dict[str, Any]:
    """Runs one variant, in turns with the eager loop if ``both``."""
    prepared, data = prepare(model, samples, recipe, device)
    settings = VARIANTS[variant]
    resident = memory.reset_peak()
    loop = (
        EagerLoop(model, BLOCK, prepared, data, config, recipe_for(model, recipe)) if both or settings is None else None
    )
    found: dict[str, Any] = {}
    if settings is None:
        assert loop is not None
        for _ in tqdm(range(config.iters), desc="eager loop"):
            loop.step()
        found["products"] = share_of_products(loop.step)
    else:
        turns = Turns(loop.step if loop else None, config.iters)
        with mock.patch.object(reconstruct_pass, "tqdm", lambda **_: turns):
            report = reconstruct(only_first_block(prepared), data, replace(config, **settings))
        found |= {"own": turns.own_seconds, "eager": turns.other_seconds, "stream bytes": report.stream_bytes}
        found |= {
            "nearest": report.rows[0].loss_before,
            "learned": report.rows[0].loss_after,
            "seconds": report.seconds,
        }
    if loop is not None:
        found["nearest, eager"] = loop.before
    found["bytes"] = memory.peak() - resident
    return found


def share_of_products(step: Callable[[], None]) -> float:
    """The part of the time in a step's operators on the CPU that matrix products and attention take."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(PROFILED):
            step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    return sum(time for name, time in times.items() if PRODUCT.search(name)) / sum(times.values())


def first_steps(model: nn.Module, samples: list[Any], config: AdaRoundConfig, recipe: str, device: str) -> list[float]:
    """Seconds that each block of a model takes for one compiled iteration: those that are alike wait for the compiler once."""
    prepared, data = prepare(model, samples, recipe, device)
    once = replace(config, iters=1, bfloat16=False, compile=True)
    return [row.seconds for row in reconstruct(prepared, data, once, progress=False).rows]


def only_first_block(prepared: GraphModule) -> GraphModule:
    """Removes the weight observers outside of :data:`BLOCK`, so that only this block is learned."""
    for node, observer in list(weight_observers(prepared)):
        if isinstance(observer, WeightObserver) and not observer.name.startswith(BLOCK + "."):
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    prepared.recompile()
    return prepared


def main(
    model: Annotated[str, typer.Option(help="reference, or pixart-xl: one block of that width")] = "reference",
    recipe: str = "w4a6",
    iters: int = 40,
    rows: Annotated[int, typer.Option(help="Calibration rows of the reference.")] = 256,
    batch_size: int = 16,
    out: Path = Path("benchmarks/results"),
    only: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures and prints."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AdaRoundConfig(iters=iters, batch_size=batch_size)

    def measured(variant: str, both: bool) -> Any:
        transformer, samples = reference_block(rows) if model == "reference" else pixart_xl_block()
        if variant == FIRST_STEPS:
            return first_steps(transformer, samples, config, recipe, device)
        return measure(transformer, samples, config, recipe, device, variant, both)

    if only:
        print(json.dumps(measured(only, False)))
        return

    def alone(variant: str, **variables: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.reconstruction", f"--only={variant}", f"--model={model}"]
        command += [f"--iters={iters}", f"--rows={rows}", f"--batch-size={batch_size}", f"--recipe={recipe}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | variables)
        return json.loads(done.stdout.splitlines()[-1])

    asked = {"model": model, "recipe": recipe, "iters": iters, "batch size": batch_size}
    result: dict[str, Any] = {"settings": asked, "environment": environment()}
    emulated = device == "cpu" and not cpu_multiplies_bfloat16()
    variants = [name for name, settings in VARIANTS.items() if not (emulated and settings and settings["bfloat16"])]
    for variant in variants:
        by_itself = alone(variant)
        result[variant] = {"products": by_itself["products"]} if VARIANTS[variant] is None else measured(variant, True)
        result[variant]["bytes"] = by_itself["bytes"]
    result["eager loop"]["own"] = result["reconstruct"]["eager"]
    result[FIRST_STEPS] = alone(FIRST_STEPS, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    lines = [line(variant, result[variant]) for variant in variants]
    print(markdown_table(["", "speed against the eager loop", "s / block-iteration", "peak memory, MiB"], lines))
    ours = result["reconstruct"]
    learned = ", ".join(f"{result[name]['learned']:.3e} ({name})" for name in variants if "learned" in result[name])
    print(
        f"\n{model}, {recipe}, {batch_size} rows an iteration; medians, in turns. Round-to-nearest error of the block by "
        f"both: {ours['nearest']:.3e}, {ours['nearest, eager']:.3e}; learned: {learned}. {one_line()}"
    )
    if device == "cpu":
        share = result["eager loop"]["products"]
        print(f"Matrix products and attention take {share:.0%} of the time in the eager loop's operators.")
    firsts = ", ".join(f"{x:.1f}" for x in result[FIRST_STEPS])
    print(f"The first compiled step of each block took {firsts} s.")
    write_text(out / f"reconstruction-{model}.json", json.dumps(result, indent=1) + "\n")


def line(variant: str, found: dict[str, Any]) -> list[str]:
    """Row of the table; the first three iterations, which warm up, are left out."""
    own = found["own"][3:]
    ratios = [e / o for e, o in zip(found.get("eager", found["own"])[3:], own, strict=True)]
    ratio = (
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if VARIANTS[variant] is not None
        else "1"
    )
    return [variant, ratio, f"{statistics.median(own):.3f}", f"{found['bytes'] / 2**20:.0f}"]


if __name__ == "__main__":
    typer.run(main)
