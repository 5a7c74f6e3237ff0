"""Loss of image quality by recipe, on the reference pipeline: ``python benchmarks/quality.py``.

Prints the table of the README and writes ``benchmarks/results/quality.{md,json}``. Every row uses the same
calibration samples, prompts and seeds, and is compared image by image with full precision. Finished rows are kept in
the work folder, so that a killed run resumes at its current row. Rows are distributed over worker processes, which is
faster than one process with as many threads.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from tqdm import tqdm

from fp4dit_ao import QuantConfig, ReconstructionConfig, collect_samples, quantize_pipeline, reference
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.fidelity import Comparison, Evaluation, Fidelity, timed_generate
from fp4dit_ao.evaluation.metrics import Images
from fp4dit_ao.passes.reconstruction import ROUNDINGS
from fp4dit_ao.util.atomic_files import write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    label: str
    config: QuantConfig | None = None
    rounding: str = "nearest"
    scope: str = "block"
    batch_size: int | None = None
    """Batch size of a float, compiled row that shows the noise floor of the comparison; None for all other rows."""
    transforms: tuple[str, ...] = ()
    """Graph transforms before quantization."""


W4A6, INT = RECIPES["w4a6"](), RECIPES["int_w4a6"]()
E2M1, AUTO = RECIPES["w4a6_e2m1"](), RECIPES["w4a6_auto"]()
STATIC, W4A8 = RECIPES["w4a6_static"](), RECIPES["w4a8"]()
NF4, CODEBOOK = RECIPES["w4a6_nf4"](), RECIPES["w4a6_codebook"]()

ROWS: dict[str, Row] = {
    "full": Row("full precision"),
    "floor": Row("full precision, compiled, other batch size", batch_size=20),
    "int-nearest": Row("INT4/INT6, nearest", INT),
    "int-adaround": Row("INT4/INT6, AdaRound", INT, "adaround"),
    "w4a6-nearest": Row("W4A6, nearest", W4A6),
    "w4a6-plain": Row("W4A6, plain AdaRound", W4A6, "adaround"),
    "w4a6": Row("W4A6, scale-aware AdaRound", W4A6, "scale_aware"),
    "e2m1-nearest": Row("W4A6 without E3M0, nearest", E2M1),
    "e2m1-gptq": Row("W4A6 without E3M0, GPTQ", E2M1, "gptq"),
    "e2m1": Row("W4A6 without E3M0, scale-aware", E2M1, "scale_aware"),
    "e2m1-window": Row("W4A6 without E3M0, scale-aware, two blocks at a time", E2M1, "scale_aware", "window"),
    "e2m1-smooth": Row("W4A6 without E3M0, SmoothQuant, nearest", E2M1, transforms=("smoothquant",)),
    "auto-nearest": Row("W4A6 auto, nearest", AUTO),
    "auto": Row("W4A6 auto, scale-aware", AUTO, "scale_aware"),
    "auto16-nearest": Row("W4A6 auto, float16 scales, nearest", replace(AUTO, scale_dtype="float16")),
    "nf4-nearest": Row("W4A6 with NF4, scales searched, nearest", NF4),
    "nf4": Row("W4A6 with NF4, scales searched, scale-aware", NF4, "scale_aware"),
    "static-nearest": Row("W4A6 static per tensor, nearest", STATIC),
    "static": Row("W4A6 static per tensor, scale-aware", STATIC, "scale_aware"),
    "w4a8-nearest": Row("W4A8, nearest", W4A8),
    "w4a8": Row("W4A8, scale-aware", W4A8, "scale_aware"),
    "w4a8-int8-nearest": Row("W4A8 with INT8 tokens, nearest", RECIPES["w4a8_int8"]()),
}
"""Rows of the table in the README."""

WHY: dict[str, Row] = {
    "only-e2m1": Row("weights E2M1 alone", replace(E2M1, activation=None, attention=None)),
    "only-e3m0-gelu": Row("weights E2M1, E3M0 before GELU, alone", replace(W4A6, activation=None, attention=None)),
    "only-e1m2": Row("weights E1M2 alone", replace(E2M1, weight="e1m2", activation=None, attention=None)),
    "only-int4": Row("weights INT4 alone", replace(INT, activation=None, attention=None)),
    "e2m1-mse": Row("W4A6 without E3M0, scales searched, nearest", replace(E2M1, weight_search="mse")),
    "e2m1-weighted": Row(
        "W4A6 without E3M0, scales searched by inputs, nearest", replace(E2M1, weight_search="weighted_mse")
    ),
    "nf4-absmax": Row("W4A6 with NF4, nearest", replace(NF4, weight_search="absmax")),
    "codebook-nearest": Row("W4A6 with codebook groups, nearest", CODEBOOK),
    "codebook-weighted": Row(
        "W4A6 with codebook groups, searched by inputs, nearest", replace(CODEBOOK, weight_search="weighted_mse")
    ),
    "codebook-gptq": Row("W4A6 with codebook groups, GPTQ", CODEBOOK, "gptq"),
    "codebook": Row("W4A6 with codebook groups, scale-aware", CODEBOOK, "scale_aware"),
    "codebook8-nearest": Row("W4A8 with codebook groups, INT8 tokens, nearest", RECIPES["w4a8_codebook"]()),
    "e2m1-groups": Row("W4A6 with codebook groups of E2M1's shape, nearest", replace(CODEBOOK, weight="e2m1_groups")),
    "e2m3": Row("INT4 weights, E2M3 activations", replace(INT, activation="e2m3", attention="e2m3")),
    "e2m1-gptq-act-order": Row("W4A6 without E3M0, GPTQ, largest inputs first", E2M1, "gptq_act_order"),
    "e2m1-layer": Row("W4A6 without E3M0, scale-aware, one linear at a time", E2M1, "scale_aware", "layer"),
    "e2m1-sign": Row("W4A6 without E3M0, AutoRound's sign gradient", E2M1, "sign_gradient"),
    "e2m1-flexround": Row("W4A6 without E3M0, FlexRound", E2M1, "flexround"),
    "e2m1-lrq": Row("W4A6 without E3M0, LRQ", E2M1, "lrq"),
    "e2m1-lowbit-fp": Row(
        "W4A6 without E3M0, LowBit-FP's scales and rounding", replace(E2M1, weight_search="lowbit_fp"), "lowbit_fp"
    ),
    "codebook-flexround": Row("W4A6 with codebook groups, FlexRound", CODEBOOK, "flexround"),
    "codebook-sign": Row("W4A6 with codebook groups, AutoRound's sign gradient", CODEBOOK, "sign_gradient"),
    "e2m1-hadamard": Row("W4A6 without E3M0, Hadamard rotations, nearest", E2M1, transforms=("hadamard",)),
    "e2m1-low-rank": Row("W4A6 without E3M0, branch of rank 32, nearest", E2M1, transforms=("low_rank",)),
    "e2m1-svdquant": Row(
        "W4A6 without E3M0, SmoothQuant, branch of rank 32, GPTQ", E2M1, "gptq", transforms=("smoothquant", "low_rank")
    ),
    "int6": Row("E2M1 weights, INT6 activations", replace(E2M1, activation="int6", attention="int6")),
}
"""Rows that explain the table: quantized weights alone, exchanged formats, and other ways to round."""

PAIRS = [
    ("w4a6-nearest", "int-nearest"), ("int-adaround", "int-nearest"), ("w4a6-plain", "w4a6-nearest"),
    ("w4a6", "w4a6-nearest"), ("w4a6", "w4a6-plain"), ("w4a6", "int-adaround"), ("e2m1-nearest", "w4a6-nearest"),
    ("e2m1-gptq", "e2m1-nearest"), ("e2m1", "e2m1-nearest"), ("e2m1", "e2m1-gptq"), ("e2m1-window", "e2m1-nearest"),
    ("e2m1-window", "e2m1"), ("e2m1-gptq-act-order", "e2m1-gptq"), ("e2m1-layer", "e2m1"),
    ("e2m1-smooth", "e2m1-nearest"), ("e2m1", "w4a6"),
    ("auto-nearest", "w4a6-nearest"), ("auto", "w4a6"), ("auto", "int-adaround"),
    ("auto16-nearest", "auto-nearest"), ("nf4-nearest", "e2m1-nearest"), ("nf4", "nf4-nearest"), ("nf4", "e2m1"),
    ("nf4", "auto"), ("nf4", "int-adaround"),
    ("w4a6-nearest", "static-nearest"), ("w4a6", "static"), ("w4a8-nearest", "w4a6-nearest"), ("w4a8", "w4a6"),
    ("w4a8-int8-nearest", "w4a8-nearest"),
    ("codebook-nearest", "nf4-nearest"), ("codebook-nearest", "e2m1-nearest"), ("codebook-nearest", "w4a6-nearest"),
    ("codebook-weighted", "codebook-nearest"), ("e2m1-weighted", "e2m1-mse"),
    ("codebook-gptq", "codebook-nearest"), ("codebook", "codebook-nearest"), ("codebook-gptq", "codebook"),
    ("e2m1-groups", "e2m1-mse"), ("e2m3", "int-nearest"),
    ("e2m1-sign", "e2m1-nearest"), ("e2m1-sign", "e2m1"), ("codebook-sign", "codebook-nearest"),
    ("codebook-sign", "codebook-gptq"), ("codebook-flexround", "codebook-gptq"),
    ("e2m1-flexround", "e2m1-nearest"), ("e2m1-flexround", "e2m1"), ("e2m1-lrq", "e2m1-flexround"),
    ("codebook-flexround", "codebook-nearest"), ("e2m1-hadamard", "e2m1-nearest"), ("e2m1-low-rank", "e2m1-nearest"),
    ("e2m1-svdquant", "e2m1-gptq"), ("e2m1-lowbit-fp", "e2m1-mse"), ("e2m1-lowbit-fp", "e2m1"),
    ("int6", "e2m1-nearest"), ("only-e2m1", "only-e3m0-gelu"), ("only-e2m1", "only-int4"),
]  # fmt: skip
"""Pairs of rows whose paired difference is printed; its interval is much narrower than those of the two rows."""


CALIBRATION = 128
"""Number of calibration prompts, none of which is evaluated."""


def split_prompts(count: int) -> tuple[list[int], list[str], list[str]]:
    """Positions and texts of the reference pipeline's prompts that are evaluated, and those that a model is calibrated on."""
    indices = named_models.reference_indices(count)
    texts = [reference.prompts()[index] for index in indices]
    others = [text for text in reference.prompts() if text not in set(texts)]
    return indices, texts, others[:: max(1, len(others) // CALIBRATION)][:CALIBRATION]


class Run:
    """One table; everything that is finished is kept in ``work``.

    Raises:
        ValueError: the folder holds rows of other settings.
    """

    def __init__(
        self, work: Path, prompts: int, seeds: int, steps: int, iters: int, samples: int, batch_size: int, compile: bool
    ):
        self.work, self.batch_size, self.compile = work, batch_size, compile
        self.seeds, self.iters, self.samples = range(seeds), iters, samples
        self.call: dict[str, Any] = {"num_inference_steps": steps}
        self.indices, self.texts, self.calibration = split_prompts(prompts)
        weights = reference.path() / "transformer" / "diffusion_pytorch_model.safetensors"
        self.settings: dict[str, Any] = {
            "prompts": prompts, "seeds": seeds, "steps": steps, "iterations": iters, "calibration samples": samples,
            "batch size": batch_size,
        }  # fmt: skip
        stamp = self.settings | {"transformer": checksum(weights)}
        work.mkdir(parents=True, exist_ok=True)
        if (work / "settings.json").exists():
            if json.loads((work / "settings.json").read_text(encoding="utf-8")) != stamp:
                raise ValueError(
                    f"{work} holds rows of other settings or another model; name another --work folder or delete it"
                )
        else:
            write_text(work / "settings.json", json.dumps(stamp, indent=1))
        self.pipe = named_models.open_pipeline(named_models.REFERENCE, "cpu")
        self.given = [
            f"--prompts={prompts}", f"--seeds={seeds}", f"--steps={steps}", f"--iters={iters}", f"--samples={samples}",
            f"--batch-size={batch_size}", f"--work={work}", "--compile" if compile else "--no-compile",
        ]  # fmt: skip

    def share_out(self, keys: list[str], workers: int) -> None:
        """Makes the missing rows in ``workers`` processes, with one log file each; the caller makes those that remain.

        Raises:
            RuntimeError: a worker failed; the message names its log.
        """
        missing = [key for key in keys if not (self.work / f"{key}.json").exists()]
        if workers < 2 or len(missing) < 2:
            return
        # made first, since all rows need it at once
        collect_samples(self.pipe, self.calibration, samples=self.samples, cache_dir=self.work / "samples", **self.call)
        missing.sort(key=lambda key: (ROWS | WHY)[key].rounding == "nearest")  # slow rows first, distributed in turn
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        running: dict[Path, subprocess.Popen[bytes]] = {}
        for number in range(min(workers, len(missing))):
            log = self.work / f"worker-{number}.log"
            command = [sys.executable, __file__, f"--rows={','.join(missing[number::workers])}", "--workers=1"]
            command += [f"--out={self.work}", f"--name=worker-{number}", *self.given]
            with log.open("wb") as file:
                running[log] = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            with tqdm(total=len(missing), desc="rows", unit="row") as bar:
                while any(process.poll() is None for process in running.values()):
                    bar.n = sum((self.work / f"{key}.json").exists() for key in missing)
                    bar.refresh()
                    time.sleep(2)
        finally:
            for process in running.values():
                process.terminate()
        failed = [log for log, process in running.items() if process.returncode]
        if failed:
            raise RuntimeError(
                f"a worker failed, see {failed[0]}; what is finished is kept, run the same command again"
            )

    def row(self, key: str) -> Fidelity:
        """Result of a row, from the work folder or made now."""
        path = self.work / f"{key}.json"
        if path.exists():
            return Fidelity.from_dict(json.loads(path.read_text(encoding="utf-8")))
        row = (ROWS | WHY)[key]
        start = time.perf_counter()
        pipe = self.original(row) if row.config is None else self.quantized(key, row)
        prepared = time.perf_counter() - start
        # compiles before timing starts
        timed_generate(pipe, self.texts[:2], [0], progress=None, num_inference_steps=2)
        batch_size = row.batch_size or self.batch_size
        images, seconds = timed_generate(
            pipe, self.texts, self.seeds, batch_size=batch_size, progress=row.label, **self.call
        )
        np.savez_compressed(self.work / f"{key}.npz", images=images)
        size, bits = named_models.size_at_16_bits(self.pipe.transformer if row.config is None else pipe.transformer)
        notes = {"bits / weight": f"{bits:.2f}", "MB": f"{size / 1e6:.1f}"}
        notes["quantize, s"] = "" if row.config is None else f"{prepared:.0f}"
        fidelity = Fidelity.of(row.label, images, self.originals(images, key), self.indices, seconds, notes)
        write_text(path, json.dumps(fidelity.to_dict()))
        shutil.rmtree(self.work / "blocks" / key, ignore_errors=True)
        return fidelity

    def original(self, row: Row) -> "DiffusionPipeline":
        if row.batch_size is None or not self.compile:
            return self.pipe
        pipe = copy.copy(self.pipe)
        object.__setattr__(pipe, "transformer", torch.compile(self.pipe.transformer, dynamic=True))
        return pipe

    def originals(self, images: Images, key: str) -> Images:
        if key == "full":
            return images
        stored: Images = np.load(self.work / "full.npz")["images"]
        return stored

    def quantized(self, key: str, row: Row) -> "DiffusionPipeline":
        """Quantized pipeline of a row, compiled if asked; the report of its reconstruction goes to the work folder."""
        assert row.config is not None
        pipe = quantize_pipeline(
            self.pipe, row.config, prompts=self.calibration, samples=self.samples, cache_dir=self.work / "samples",
            reconstruction=ReconstructionConfig(row.rounding, scope=row.scope, iters=self.iters),
            checkpoint_dir=self.work / "blocks" / key if ROUNDINGS[row.rounding].needs_samples else None,
            transforms=row.transforms,
            compile=self.compile, **self.call,
        )  # fmt: skip
        if pipe.transformer.report is not None:
            write_text(self.work / f"{key}.report.md", pipe.transformer.report.to_markdown() + "\n")
            write_text(self.work / f"{key}.report.json", json.dumps(pipe.transformer.report.to_dict()))
        formats = {layer.name: layer.weight for layer in pipe.transformer.summary() if layer.quantized and layer.weight}
        write_text(self.work / f"{key}.formats.json", json.dumps(formats, indent=1))
        return pipe


def checksum(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(
    prompts: Annotated[int, typer.Option(min=2, help="Prompts, spread over the reference pipeline's.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per prompt.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    iters: Annotated[int, typer.Option(min=1, help="Iterations of learned rounding per block.")] = 400,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples, spread over prompts and steps.")] = 1280,
    batch_size: Annotated[int, typer.Option(min=1, help="Images generated together.")] = 32,
    rows: Annotated[str, typer.Option(help="Comma-separated keys of ROWS and WHY, or 'all', or 'why'.")] = "all",
    work: Annotated[Path, typer.Option(help="Where finished rows are kept.")] = Path("outputs/quality"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(__file__).parent / "results",
    name: Annotated[str, typer.Option(help="Name of the result files.")] = "quality",
    compile: Annotated[bool, typer.Option(help="Generate under torch.compile.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes that make rows.")] = min(4, os.cpu_count() or 1),
) -> None:
    """Prints the table, and writes it as Markdown and JSON."""
    sets = {"all": list(ROWS), "why": ["full", *WHY]}
    keys = sets.get(rows) or ["full", *(key for key in rows.split(",") if key != "full")]
    unknown = sorted(set(keys) - set(ROWS | WHY))
    if unknown:
        raise typer.BadParameter(f"no row {', '.join(unknown)}; there are {', '.join(ROWS | WHY)}")
    run = Run(work, prompts, seeds, steps, iters, samples, batch_size, compile)
    done = {"full": run.row("full")}
    run.share_out(keys, workers)
    for key in keys:
        done[key] = run.row(key)
        show(run, done, out, name)
    print(show(run, done, out, name))


def show(run: Run, done: dict[str, Fidelity], out: Path, name: str) -> str:
    """Writes the rows that are finished, and returns them as Markdown."""
    pairs = [Comparison.of(done[a], done[b]) for a, b in PAIRS if a in done and b in done]
    evaluation = Evaluation(list(done.values()), run.settings, pairs)
    evaluation.save(out / f"{name}.json")
    text = evaluation.markdown()
    write_text(out / f"{name}.md", text)
    return text


if __name__ == "__main__":
    typer.run(main)
