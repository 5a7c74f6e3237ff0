"""The command: see :mod:`benchmarks.gpu`."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu import attention, decode, device_tests, linears, reconstruction, step
from benchmarks.gpu.measuring import Run, error_of, preparing
from fp4dit_ao.evaluation.environment import environment, one_line

PARTS: dict[str, Callable[[Run], None]] = {
    "tests": device_tests.measure,
    "decode": decode.measure,
    "linears": linears.measure,
    "step": step.measure,
    "attention": attention.measure,
    "reconstruction": reconstruction.measure,
}
"""Parts by name, most telling first."""


def gpu() -> dict[str, Any]:
    """Name, driver, clock and power limit of the GPU."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        driver = f"unknown ({type(error).__name__})"
    return {
        "name": properties.name, "driver, clock, power": driver, "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory, "cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability(0),
    }  # fmt: skip


def parts_of(text: str) -> list[str]:
    """The parts named in a comma-separated list, in the order given.

    Raises:
        typer.BadParameter: one that there is not.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise typer.BadParameter(f"unknown part {', '.join(unknown) or text!r}; choose among {','.join(PARTS)}")
    return names


def main(
    part: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(PARTS)}.")] = ",".join(PARTS),
    minutes: Annotated[float, typer.Option(help="When each part stops measuring.")] = 3.5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every call is measured.")] = 11,
    only: Annotated[str, typer.Option(help="Part of the names of the cases to measure, such as 'FLUX'.")] = "",
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("benchmarks/results/gpu.json"),
) -> None:
    """Measures and prints."""
    names = parts_of(part)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu measures an NVIDIA GPU, and this machine has none that PyTorch can use.")
    run = Run(out, {"environment": environment(), "gpu": gpu()}, rounds=rounds, only=only)
    run.say(
        f"{run.report['gpu']['name']}, driver, clock, power: {run.report['gpu']['driver, clock, power']}; {one_line()}"
    )
    for name in names:
        run.say(f"\n## {name}\n")
        began = time.monotonic()
        run.until = began + 60 * minutes
        try:
            with preparing() as run.lock, torch.no_grad():
                PARTS[name](run)
        except Exception as error:  # the next part may still tell something
            run.record("failed parts", {"part": name, "error": error_of(error)})
            run.say(f"{name} failed: {error_of(error)}")
        run.record("parts", {"part": name, "seconds": time.monotonic() - began, "left out": run.skipped})
        run.skipped, run.lock = [], None
        torch.compiler.reset()
        torch.cuda.empty_cache()
