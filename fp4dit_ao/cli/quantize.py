"""``fp4dit-ao quantize``: a float pipeline in, a quantized one saved."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp4dit_ao.calibration import read_prompts
from fp4dit_ao.config import QuantConfig, ReconstructionConfig
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation.fidelity import write_text
from fp4dit_ao.passes.reconstruction.choice import chosen_config
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS, ClosedFormRounding

CALIBRATION_PROMPTS = 64
"""Taken from the reference pipeline's own where the user gives none."""


def quantize(
    model: str, out: Path, *, recipe: str, prompts: Path | None, rounding: str, iters: int | None, skip: Sequence[str],
    steps: int | None, samples: int, seed: int, resume: bool, device: str | None,
    objective: str | None = None, scope: str | None = None,
) -> None:  # fmt: skip
    """Quantize ``model`` and save it to ``out``; a killed run leaves ``<out>.unfinished``, and ``resume`` continues it.

    Raises:
        ValueError, OSError: wrong input, all of it checked before the model is loaded as far as that is possible.
    """
    config = QuantConfig.from_name(recipe)
    rounded = chosen_config(rounding, objective, scope)
    if iters is not None:
        if isinstance(ROUNDINGS.find(rounded.rounding), ClosedFormRounding):
            raise ValueError(f"--iters is the length of learned rounding; leave it out with --rounding {rounding}")
        rounded = replace(rounded, iters=iters)
    named_models.folder_of(model)
    texts = read_prompts(prompts) if prompts else named_models.default_prompts(model, CALIBRATION_PROMPTS)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"cannot save to {out}: the folder is not empty; name a new one, or empty it")
    unfinished = out.with_name(out.name + ".unfinished")
    if unfinished.exists() and not resume:
        raise FileExistsError(f"{unfinished} holds an unfinished run; continue it with --resume, or delete it")
    pipe = named_models.open_pipeline(model, device)
    start = time.perf_counter()
    try:
        quantized = _quantize(pipe, config, texts, rounded, skip, steps, samples, seed, unfinished)
        quantized.save_pretrained(out)
    except Exception:
        if not any(unfinished.glob("blocks/block-*")):
            shutil.rmtree(unfinished, ignore_errors=True)  # nothing in it that would save time
        raise
    if quantized.transformer.report is not None:
        print(quantized.transformer.report.to_markdown(), end="\n\n")
        write_text(out / "reconstruction.md", quantized.transformer.report.to_markdown() + "\n")
    shutil.rmtree(unfinished, ignore_errors=True)
    size, bits = named_models.size_at_16_bits(quantized.transformer)
    before, _ = named_models.size_at_16_bits(pipe.transformer)
    print(f"{before / 1e6:.2f} MB → {size / 1e6:.2f} MB ({bits:.2f} bits per quantized weight, the rest at 16 bits)")
    print(f"saved after {time.perf_counter() - start:.0f} s: {out}")
    print(f"next: fp4dit-ao generate {out} --compare {model} --prompt {texts[0]!r}")


def _quantize(
    pipe: Any, config: QuantConfig, texts: list[str], rounded: ReconstructionConfig, skip: Sequence[str],
    steps: int | None, samples: int, seed: int, unfinished: Path,
) -> Any:  # fmt: skip
    from fp4dit_ao.diffusers_integration.pipeline_quantization import quantize_pipeline

    long = ROUNDINGS.find(rounded.rounding).needs_samples
    return quantize_pipeline(
        pipe, config, prompts=texts, steps=steps, samples=samples, skip=skip, seed=seed,
        reconstruction=rounded,
        checkpoint_dir=unfinished / "blocks" if long else None,
        cache_dir=unfinished / "samples" if long else None,
    )  # fmt: skip
