"""``fp4dit-ao evaluate``: a table of how close a quantized pipeline's images are to the original's."""

from pathlib import Path

from fp4dit_ao.calibration import read_prompts
from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation import fidelity as judge
from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity


def evaluate(
    model: str, against: str, prompts: Path | None, count: int, seeds: int, call: dict[str, object], batch_size: int,
    out: Path, compile: bool, device: str | None, dtype: str,
) -> None:  # fmt: skip
    """Generates with both models and arguments ``call``, prints the Markdown table and writes everything as JSON."""
    named_models.folder_of(model)
    texts = read_prompts(prompts)[:count] if prompts else named_models.default_prompts(against, count)
    indices = named_models.known_prompts(texts) if named_models.is_reference(against) else None
    images, seconds, footprints = {}, {}, {}
    settings: dict[str, object] = {"prompts": len(texts), "seeds": seeds, "batch size": batch_size}
    settings |= {name: value for name, value in call.items() if name != "num_inference_steps"}
    for name in (against, model):
        pipe = named_models.open_pipeline(name, device, compile=compile, dtype=dtype)
        settings["steps"] = call_arguments(pipe, **call).get("num_inference_steps", "default")
        options = {"batch_size": batch_size, "progress": name, **call}
        images[name], seconds[name] = judge.timed_generate(pipe, texts, range(seeds), **options)
        footprints[name] = named_models.size_at_16_bits(pipe.transformer)
    variants = []
    for name in (against, model):
        size, bits = footprints[name]
        notes = {"bits / weight": f"{bits:.2f}", "transformer, MB": f"{size / 1e6:.2f}"}
        variants.append(Fidelity.of(name, images[name], images[against], indices, seconds[name], notes))
    evaluation = Evaluation(variants, settings | {"model": model, "against": against, "prompt texts": texts})
    print(evaluation.markdown())
    print("Megabytes count everything that is not quantized at 16 bits.")
    evaluation.save(out)
    print(f"image by image: {out}")
