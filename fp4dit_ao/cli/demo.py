"""``fp4dit-ao demo``: quantizes the reference pipeline in a few minutes on two cores."""

import time
from pathlib import Path

from fp4dit_ao import reference
from fp4dit_ao.cli.compilation import compile_if_possible
from fp4dit_ao.config import DEFAULT_RECIPE, ReconstructionConfig
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.pipeline_quantization import quantize_pipeline
from fp4dit_ao.evaluation import plots
from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity, generate
from fp4dit_ao.evaluation.metrics import Images
from fp4dit_ao.util.atomic_files import write_text

JUDGED, SHOWN = 40, 8
"""Number of prompts generated for the table, and number of those that the picture shows."""
CALIBRATION_PROMPTS, CALIBRATION_SAMPLES = 32, 128
BATCH = 20


def demo(out: Path, rounding: str, iters: int, seed: int, compile: bool) -> None:
    """Quantizes to W4A6 and to naive INT4/INT6; writes ``comparison.png``, ``table.md`` and ``w4a6/`` into ``out``."""
    start = time.perf_counter()
    compile = compile_if_possible(compile, "cpu")
    print("[1/4] loading the reference pipeline", flush=True)
    pipe = named_models.open_pipeline(named_models.REFERENCE, "cpu")
    known = reference.prompts()
    judged = named_models.reference_indices(JUDGED)
    prompts = [known[index] for index in judged]
    calibration = [known[index] for index in named_models.reference_indices(CALIBRATION_PROMPTS)]

    print(f"[2/4] quantizing to W4A6 ({DEFAULT_RECIPE}), weights rounded by {rounding}", flush=True)
    began = time.perf_counter()
    w4a6 = quantize_pipeline(
        pipe, samples=CALIBRATION_SAMPLES, reconstruction=ReconstructionConfig(rounding, iters=iters), compile=compile,
        prompts=calibration, seed=seed,
    )  # fmt: skip
    seconds = {"original": 0.0, "W4A6": time.perf_counter() - began}
    began = time.perf_counter()
    naive = quantize_pipeline(pipe, "int_w4a6", rounding="nearest", prompts=calibration, seed=seed)
    seconds["INT4/INT6 nearest"] = time.perf_counter() - began

    print(f"[3/4] drawing {JUDGED} prompts with each" + (", W4A6 compiled" if compile else ""), flush=True)
    variants = {"original": pipe, "W4A6": w4a6, "INT4/INT6 nearest": naive}
    images: dict[str, Images] = {}
    rows = []
    for name, variant in variants.items():
        warm_up = time.perf_counter()
        generate(
            variant,
            prompts[:2],
            [seed],
            progress=f"{name}: {'compiling, a minute or two' if compile and variant is w4a6 else 'warm up'}",
            num_inference_steps=2,
        )
        drawing = time.perf_counter()
        images[name] = generate(variant, prompts, [seed], batch_size=BATCH, progress=name)
        each = (time.perf_counter() - drawing) / JUDGED
        size, bits = named_models.size_at_16_bits(variant.transformer)
        notes = {"bits / weight": f"{bits:.2f}", "transformer, bytes": f"{size:,}"}
        notes |= {"quantize, s": f"{seconds[name]:.0f}", "warm up, s": f"{drawing - warm_up:.0f}"}
        rows.append(Fidelity.of(name, images[name], images["original"], judged, each, notes))

    print("[4/4] writing the picture, the table and the quantized pipeline", flush=True)
    w4a6.save_pretrained(out / "w4a6")
    shown = range(0, JUDGED, JUDGED // SHOWN)
    columns = {name: drawn[0][list(shown)] for name, drawn in images.items()}
    plots.save(plots.comparison(columns, [prompts[index] for index in shown]), out / "comparison.png")
    settings = {
        "prompts": JUDGED,
        "seeds": 1,
        "steps": reference.generation()["num_inference_steps"],
        "recipe": DEFAULT_RECIPE,
        "rounding": rounding,
        "W4A6 compiled": "yes" if compile else "no",
    }
    evaluation = Evaluation(rows, settings)
    write_text(out / "table.md", evaluation.markdown())
    evaluation.save(out / "table.json")
    print()
    print(evaluation.markdown())
    print(f"Bytes count everything that is not quantized at 16 bits. {time.perf_counter() - start:.0f} s in all.")
    print(f"picture: {out / 'comparison.png'}")
    print(f"quantized pipeline: {out / 'w4a6'} (try: fp4dit-ao inspect {out / 'w4a6'} --against reference)")
