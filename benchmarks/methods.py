"""Every method under one evaluation: ``python -m benchmarks.methods``.

For W4A8, W4A6 and W4A4 on the reference pipeline: nearest rounding in each number format, every registered rounding,
transform, objective, scope and fine-tuning alone, and combinations. A row is made in a process of its own, so that its peak of
memory is its own. Finished rows stay in ``--rows``, each with its machine, so that the table can grow over many runs and
machines; a killed run resumes within its current row. Prints the table, which differences from nearest rounding in the same
format are significant, and what to choose for a number of bits and a time; ``--no-make`` prints it of the finished rows.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats  # type: ignore[import-untyped]
from tqdm import tqdm

from benchmarks.method_rows import BUDGETS, Row, all_rows
from benchmarks.quality import split_prompts
from fp4dit_ao import ReconstructionConfig, collect_samples, quantize_pipeline
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.environment import describe, environment
from fp4dit_ao.evaluation.fidelity import Fidelity, timed_generate
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

RESULTS = Path(__file__).parent / "results"
SIGNIFICANT = 0.05
BITS, SECONDS = (4.3, 5.3, 8.5), (60, 600, 3600)
"""Limits for which a method is recommended: bits per weight, seconds to quantize."""
TURNS = 3
"""Times that generating by the original and by the quantized pipeline are timed, one after the other."""


@dataclass(frozen=True)
class Settings:
    """Settings that all rows of a table share."""

    prompts: int
    seeds: int
    steps: int
    iters: int
    samples: int
    compile: bool

    @property
    def call(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps}


def make_row(key: str, settings: Settings, work: Path, folder: Path) -> None:
    """Makes a row and writes ``KEY.json`` to ``folder``; it is compared with the original's images in ``work``."""
    row = all_rows(BUDGETS)[key]
    indices, texts, calibration = split_prompts(settings.prompts)
    original = named_models.open_pipeline(named_models.REFERENCE, "cpu")
    if row.config is None:
        collect_samples(original, calibration, samples=settings.samples, cache_dir=work / "samples", **settings.call)
        pipe, seconds = original, 0.0
    else:
        began = time.perf_counter()
        pipe = quantize_pipeline(
            original, row.config, prompts=calibration, samples=settings.samples, cache_dir=work / "samples",
            reconstruction=ReconstructionConfig(
                row.rounding, objective=row.objective, scope=row.scope, iters=settings.iters
            ),
            transforms=row.transforms, fine_tuning=row.fine_tuning, checkpoint_dir=work / "blocks" / key,
            compile=settings.compile, **settings.call,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    timed_generate(pipe, texts[:2], [0], progress=None, num_inference_steps=2)  # compiles
    images, _ = timed_generate(pipe, texts, range(settings.seeds), progress=row.label, **settings.call)
    if row.config is None:
        np.savez_compressed(work / "full.npz", images=images)
    took: dict[str, list[float]] = {"original": [], "quantized": []}
    for _ in range(TURNS):
        for name, each in (("original", original), ("quantized", pipe)):
            took[name].append(timed_generate(each, texts[:8], [0], progress=None, **settings.call)[1])
    speed = float(np.median(np.divide(took["original"], took["quantized"])))
    size, bits = named_models.size_at_16_bits(pipe.transformer)
    originals = np.load(work / "full.npz")["images"]
    notes = {
        "bits": f"{bits:.2f}", "MB": f"{size / 1e6:.1f}", "quantize, s": f"{seconds:.0f}", "peak, MB": f"{peak:.0f}",
        "speed": f"{speed:.2f}",
    }  # fmt: skip
    fidelity = Fidelity.of(row.label, images, originals, indices, notes=notes)
    write_text(folder / f"{key}.json", json.dumps(fidelity.to_dict() | {"environment": environment()}) + "\n")


def adjusted(differences: Sequence[np.ndarray]) -> list[float]:
    """p-values of paired differences over prompts, corrected for their number (Benjamini and Yekutieli).

    Args:
        differences: PSNR in dB of a row less that of its base, ``(seeds, prompts)`` each.
    """
    values = [float(stats.ttest_1samp(each.mean(0), 0.0).pvalue) for each in differences]
    return [] if not values else list(stats.false_discovery_control(np.nan_to_num(values, nan=1.0), method="by"))


def table(rows: dict[str, Row], done: dict[str, Fidelity]) -> str:
    """Markdown table of finished rows, each compared with its base."""
    paired = [key for key in done if rows[key].base in done]
    differences = [done[key].psnr - done[str(rows[key].base)].psnr for key in paired]
    p = dict(zip(paired, adjusted(differences), strict=True))
    change = dict(zip(paired, (float(each.mean()) for each in differences), strict=True))
    lines = []
    for key, fidelity in done.items():
        estimates = fidelity.estimates()
        verdict = ""
        if key in p:
            word = "no difference shown" if p[key] >= SIGNIFICANT else "better" if change[key] > 0 else "worse"
            verdict = f"{change[key]:+.2f} dB: {word}"
        psnr = "identical" if key == "full" else estimates["psnr"].text(2)
        accuracy = estimates["accuracy"].text(0, percent=True) if "accuracy" in estimates else ""
        budget = "" if key == "full" else key.partition("-")[0].upper()
        lines.append(
            [budget, fidelity.name, psnr, estimates["ssim"].text(3), accuracy, *fidelity.notes.values(), verdict]
        )
    notes = list(next(iter(done.values())).notes)
    head = ["", "method", "PSNR, dB", "SSIM", "prompt accuracy", *notes, "against nearest, same format"]
    return markdown_table(head, lines)


def recommendations(done: dict[str, Fidelity]) -> str:
    """Markdown table: the method of the highest PSNR within each number of bits per weight and time."""
    lines = []
    for bits in BITS:
        for seconds in SECONDS:
            fitting = {
                key: fidelity for key, fidelity in done.items()
                if key != "full" and float(fidelity.notes["bits"]) <= bits and float(fidelity.notes["quantize, s"]) <= seconds
            }  # fmt: skip
            if fitting:
                key, best = max(fitting.items(), key=lambda item: float(item[1].psnr.mean()))
                budget = key.partition("-")[0].upper()
                psnr = f"{best.psnr.mean():.2f}"
                lines.append(
                    [str(bits), str(seconds), budget, best.name, psnr, best.notes["bits"], best.notes["speed"]]
                )
    return markdown_table(["bits at most", "seconds at most", "", "method", "PSNR, dB", "bits", "speed"], lines)


def read(keys: Sequence[str], folder: Path) -> Iterator[tuple[str, Fidelity, str]]:
    """Finished rows: key, metrics and machine."""
    for key in keys:
        if (folder / f"{key}.json").exists():
            data = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
            yield key, Fidelity.from_dict(data), describe(data["environment"])


def report(
    rows: dict[str, Row],
    finished: Sequence[tuple[str, Fidelity, str]],
    settings: Settings,
    failed: dict[str, str],
    wanted: Sequence[str],
) -> str:
    """Table, what it rests on, which rows are missing, and recommendations."""
    done = {key: fidelity for key, fidelity, _ in finished}
    machines = Counter(machine for _, _, machine in finished)
    notes = [
        "Against the original at equal seeds, with 95 % intervals over prompts; differences by a paired test over prompts, "
        f"corrected for their number. {', '.join(f'{name} {value}' for name, value in vars(settings).items())}.",
        *(f"{count} row{'s' * (count > 1)} on {machine}" for machine, count in machines.items()),
        *(f"{key} failed: {why.splitlines()[-1] if why else 'no message'}" for key, why in failed.items()),
    ]  # fmt: skip
    left = [key for key in wanted if key not in done]
    if left:
        notes.append(f"Not made yet: {', '.join(left)}.")
    return "\n\n".join([table(rows, done), *notes, recommendations(done)]) + "\n"


def unfinished(keys: Sequence[str], work: Path, folder: Path) -> list[str]:
    """Rows to make. The original's is made again where its images are not on this machine and another row needs them."""
    missing = [key for key in keys if not (folder / f"{key}.json").exists()]
    return ["full", *missing] if missing and "full" not in missing and not (work / "full.npz").exists() else missing


def make_all(missing: list[str], given: list[str], work: Path, workers: int) -> dict[str, str]:
    """Makes rows, each in a process, the original first; returns what failed, with the end of its log."""
    failed: dict[str, str] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    def start(key: str) -> None:
        with (work / f"{key}.log").open("wb") as log:
            command = [sys.executable, "-m", "benchmarks.methods", f"--row={key}", *given]
            running[key] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    try:
        with tqdm(total=len(missing), desc="rows", unit="row") as bar:
            while missing or running:
                alone = "full" in running or bool(missing and missing[0] == "full")
                while missing and len(running) < (1 if alone else workers):
                    start(missing.pop(0))
                    alone = "full" in running
                time.sleep(0.5)
                for key in [key for key, process in running.items() if process.poll() is not None]:
                    if running.pop(key).returncode:
                        failed[key] = (work / f"{key}.log").read_text(encoding="utf-8", errors="replace").strip()[-300:]
                    bar.update()
    finally:
        for process in running.values():
            process.terminate()
    return failed


def main(
    budgets: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(BUDGETS)}.")] = ",".join(BUDGETS),
    only: Annotated[str, typer.Option(help="Comma-separated keys of rows, such as 'w4a6-gptq'; all if empty.")] = "",
    prompts: Annotated[int, typer.Option(min=2, help="Prompts, spread over the reference pipeline's.")] = 80,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    iters: Annotated[int, typer.Option(min=1, help="Iterations of learned rounding per block.")] = 300,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 320,
    compile: Annotated[bool, typer.Option(help="Generate under torch.compile.")] = False,
    work: Annotated[Path, typer.Option(help="Calibration samples, checkpoints and logs.")] = Path("outputs/methods"),
    kept: Annotated[Path, typer.Option("--rows", help="Where finished rows are kept.")] = RESULTS / "every_method",
    out: Annotated[Path, typer.Option(help="Markdown file.")] = RESULTS / "every_method.md",
    make: Annotated[bool, typer.Option(help="Make the rows that are missing.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make rows.")] = min(4, os.cpu_count() or 1),
    row: Annotated[str, typer.Option(help="Make this row alone, in this process.", hidden=True)] = "",
) -> None:
    """Makes the rows that are missing, and prints the table."""
    settings = Settings(prompts, seeds, steps, iters, samples, compile)
    if row:
        make_row(row, settings, work, kept)
        return
    for folder in (work, kept):  # samples and checkpoints depend on the settings, too
        folder.mkdir(parents=True, exist_ok=True)
        stamp, text = folder / "settings.json", json.dumps(vars(settings)) + "\n"
        if stamp.exists() and stamp.read_text(encoding="utf-8") != text:
            raise typer.BadParameter(f"{folder} is of a run with other settings; name other --work and --rows folders")
        write_text(stamp, text)
    chosen = [name.strip() for name in budgets.split(",")]
    unknown = sorted(set(chosen) - set(BUDGETS))
    if unknown:
        raise typer.BadParameter(f"no budget {', '.join(unknown)}; there are {', '.join(BUDGETS)}")
    rows = all_rows(chosen)
    keys = ["full", *only.split(",")] if only else list(rows)
    missing = sorted(set(keys) - set(rows))
    if missing:
        raise typer.BadParameter(f"no row {', '.join(missing)}; there are {', '.join(rows)}")
    given = [f"--prompts={prompts}", f"--seeds={seeds}", f"--steps={steps}", f"--iters={iters}", f"--samples={samples}"]
    given += ["--compile" if compile else "--no-compile", f"--work={work}", f"--rows={kept}"]
    failed = make_all(unfinished(keys, work, kept), given, work, workers) if make else {}
    finished = list(read(keys, kept))
    if not finished:
        raise typer.BadParameter(
            f"no row is finished in {kept}{''.join(f'; {key}: {why}' for key, why in failed.items())}"
        )
    text = report(rows, finished, settings, failed, [key for key in keys if key not in failed])
    write_text(out, text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
