"""``fp4dit-ao quantize``: quantizes a float pipeline and saves it."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from fp4dit_ao.calibration import SELECTIONS, read_prompts
from fp4dit_ao.config import AdaRoundConfig, QuantConfig
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.pipeline_quantization import ROUNDINGS, quantize_pipeline
from fp4dit_ao.util.atomic_files import write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CALIBRATION_PROMPTS = 64
"""Number of the reference pipeline's own prompts that are used if the user gives none."""


def quantize(
    model: str, out: Path, *, recipe: str, prompts: Path | None, rounding: str, iters: int | None, skip: Sequence[str],
    steps: int | None, samples: int, selection: str, seed: int, resume: bool, device: str | None,
) -> None:  # fmt: skip
    """Quantizes ``model`` and saves it to ``out``; a killed run leaves ``<out>.unfinished``, from which ``resume``
    continues.

    Raises:
        ValueError, OSError: wrong input; as much of it as possible is checked before the model is loaded.
    """
    QuantConfig.from_name(recipe)  # refuses an unknown name; the table of families decides what it means for the model
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown --rounding {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    if iters is not None and rounding == "nearest":
        raise ValueError("--iters is the length of learned rounding; leave it out with --rounding nearest")
    SELECTIONS.find(selection)
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
        quantized = _quantize(pipe, recipe, texts, rounding, iters, skip, steps, samples, selection, seed, unfinished)
        quantized.save_pretrained(out)
    except Exception:
        if not any(unfinished.glob("blocks/block-*")):
            shutil.rmtree(unfinished, ignore_errors=True)  # holds nothing that a resumed run would reuse
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
    pipe: "DiffusionPipeline", recipe: str, texts: list[str], rounding: str, iters: int | None, skip: Sequence[str],
    steps: int | None, samples: int, selection: str, seed: int, unfinished: Path,
) -> "DiffusionPipeline":  # fmt: skip
    learned = rounding == "adaround"
    return quantize_pipeline(
        pipe, recipe, prompts=texts, steps=steps, samples=samples, selection=selection, skip=skip, seed=seed,
        rounding=cast(Literal["adaround", "nearest"], rounding),
        adaround=AdaRoundConfig() if iters is None else AdaRoundConfig(iters=iters),
        checkpoint_dir=unfinished / "blocks" if learned else None,
        cache_dir=unfinished / "samples" if learned else None,
    )  # fmt: skip
