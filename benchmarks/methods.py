"""Every method under one evaluation: ``python -m benchmarks.methods``.

For W4A8, W4A6 and W4A4 on the reference pipeline: nearest rounding in each number format, every registered rounding,
transform, objective, scope and fine-tuning alone, and combinations. A row is made in a process of its own, so that its peak of
memory is its own; finished rows stay in ``--work``, and a killed run resumes at its current row. Prints the table, which
differences from nearest rounding in the same format are significant, and what to choose for a number of bits and a time.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy import stats  # type: ignore[import-untyped]
from tqdm import tqdm

from benchmarks.quality import split_prompts
from fp4dit_ao import QuantConfig, ReconstructionConfig, collect_samples, quantize_pipeline
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.environment import one_line
from fp4dit_ao.evaluation.fidelity import Fidelity, timed_generate
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS
from fp4dit_ao.passes.reconstruction import OBJECTIVES, ROUNDINGS, SCOPES
from fp4dit_ao.passes.transforms.registry import TRANSFORMS
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

BUDGETS = ("w4a8", "w4a6", "w4a4")
BLOCK_RECIPES = ("nvfp4", "mxfp4")
LEARNED = "scale_aware"
SIGNIFICANT = 0.05
BITS, SECONDS = (4.3, 5.3, 8.5), (60, 600, 3600)
"""Limits for which a method is recommended: bits per weight, seconds to quantize."""
TURNS = 3
"""Times that generating by the original and by the quantized pipeline are timed, one after the other."""


@dataclass(frozen=True)
class Row:
    """One row of the table. ``base`` is the key of the row with nearest rounding in the same format."""

    label: str
    config: QuantConfig | None
    rounding: str = "nearest"
    objective: str = "mse"
    scope: str = "block"
    transforms: tuple[str, ...] = ()
    fine_tuning: str | None = None
    base: str | None = None


def rows_of(budget: str) -> dict[str, Row]:
    """Rows of a budget by key: formats, then every registered method alone with codebook groups, then combinations."""
    codebook = RECIPES[f"{budget}_codebook"]()
    e2m1 = replace(RECIPES[budget](), weight="e2m1", pre_gelu_weight=None)
    base = f"{budget}-nearest"
    found = {
        base: Row("codebook groups, nearest", codebook),
        f"{budget}-e2m1": Row("E2M1, nearest", e2m1),
        f"{budget}-int": Row("INT4, nearest", RECIPES[f"int_{budget}"]()),
    }

    def add(name: str, label: str, **options: Any) -> None:
        found[f"{budget}-{name}"] = Row(f"codebook groups, {label}", codebook, base=base, **options)

    for name in ROUNDINGS:
        if name != "nearest":
            add(name, name, rounding=name)
    for name in TRANSFORMS:
        add(name, f"{name}, nearest", transforms=(name,))
    for name in OBJECTIVES:
        if name != "mse":
            add(name, f"{LEARNED}, {name}", rounding=LEARNED, objective=name)
    for name in SCOPES:
        if name != "block":
            add(name, f"{LEARNED}, by {name}", rounding=LEARNED, scope=name)
    for name in FINE_TUNINGS:
        add(name, f"nearest, fine-tuning {name}", fine_tuning=name)
    for transforms in (("smoothquant",), ("hadamard",), ("low_rank",), ("smoothquant", "low_rank")):
        names = "+".join(transforms)
        add(f"{names}+gptq", f"{', '.join(transforms)}, gptq", rounding="gptq", transforms=transforms)
    add("gptq+scales", "gptq, fine-tuning scales", rounding="gptq", fine_tuning="scales")
    for name in ("gptq", LEARNED):
        found[f"{budget}-e2m1-{name}"] = Row(f"E2M1, {name}", e2m1, name, base=f"{budget}-e2m1")
    if budget == "w4a4":
        for recipe in BLOCK_RECIPES:
            blocks, key = RECIPES[recipe](), f"{budget}-{recipe}"
            found[key] = Row(f"{recipe.upper()}, nearest", blocks)
            found[f"{key}-gptq"] = Row(f"{recipe.upper()}, gptq", blocks, "gptq", base=key)
    return found


def all_rows(budgets: Sequence[str]) -> dict[str, Row]:
    """The original, and the rows of each budget."""
    return {"full": Row("full precision", None)} | {
        key: row for budget in budgets for key, row in rows_of(budget).items()
    }


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


def make_row(key: str, settings: Settings, work: Path) -> None:
    """Makes a row and writes ``KEY.json``, which is compared with the original's images; those are made first."""
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
    write_text(work / f"{key}.json", json.dumps(fidelity.to_dict()))


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
            fitting = [
                fidelity for key, fidelity in done.items()
                if key != "full" and float(fidelity.notes["bits"]) <= bits and float(fidelity.notes["quantize, s"]) <= seconds
            ]  # fmt: skip
            if fitting:
                best = max(fitting, key=lambda each: float(each.psnr.mean()))
                lines.append(
                    [
                        f"{bits}",
                        f"{seconds}",
                        best.name,
                        f"{best.psnr.mean():.2f}",
                        best.notes["bits"],
                        best.notes["speed"],
                    ]
                )
    return markdown_table(["bits at most", "seconds at most", "method", "PSNR, dB", "bits", "speed"], lines)


def read(rows: Sequence[str], work: Path) -> Iterator[tuple[str, Fidelity]]:
    """Finished rows."""
    for key in rows:
        if (work / f"{key}.json").exists():
            yield key, Fidelity.from_dict(json.loads((work / f"{key}.json").read_text(encoding="utf-8")))


def make_all(keys: Sequence[str], given: list[str], work: Path, workers: int) -> dict[str, str]:
    """Makes the missing rows, each in a process, the original first; returns what failed, with the end of its log."""
    missing = [key for key in keys if not (work / f"{key}.json").exists()]
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
    work: Annotated[Path, typer.Option(help="Where finished rows are kept.")] = Path("outputs/methods"),
    out: Annotated[Path, typer.Option(help="Markdown file.")] = Path(__file__).parent / "results" / "every_method.md",
    workers: Annotated[int, typer.Option(min=1, help="Processes that make rows.")] = min(4, os.cpu_count() or 1),
    row: Annotated[str, typer.Option(help="Make this row alone, in this process.", hidden=True)] = "",
) -> None:
    """Makes the rows that are missing, and prints the table."""
    settings = Settings(prompts, seeds, steps, iters, samples, compile)
    work.mkdir(parents=True, exist_ok=True)
    if row:
        make_row(row, settings, work)
        return
    stamp = json.dumps(vars(settings))
    if (work / "settings.json").exists() and (work / "settings.json").read_text(encoding="utf-8") != stamp:
        raise typer.BadParameter(f"{work} holds rows of other settings; name another --work folder or delete it")
    write_text(work / "settings.json", stamp)
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
    given += ["--compile" if compile else "--no-compile", f"--work={work}"]
    failed = make_all(keys, given, work, workers)
    done = dict(read(keys, work))
    said = "".join(f"\n{key} failed: {why.splitlines()[-1] if why else 'no message'}" for key, why in failed.items())
    text = (
        f"{table(rows, done)}\n\nAgainst the original at equal seeds, with 95 % intervals over prompts; differences by a "
        f"paired test over prompts, corrected for their number. {', '.join(f'{k} {v}' for k, v in vars(settings).items())}. "
        f"{one_line()}{said}\n\n{recommendations(done)}\n"
    )
    write_text(out, text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
