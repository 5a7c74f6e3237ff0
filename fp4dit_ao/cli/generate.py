"""``fp4dit-ao generate``: draws prompts into one picture, beside another model's images if asked."""

from pathlib import Path

from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.evaluation import fidelity, metrics, plots
from fp4dit_ao.util.markdown import markdown_table


def generate(
    model: str, prompts: list[str], out: Path, compare: str | None, seed: int, call: dict[str, object], batch_size: int,
    compile: bool, device: str | None, weights: str, dtype: str,
) -> None:  # fmt: skip
    """Draws ``prompts`` with one seed and arguments ``call``, ``model`` with ``weights``; prints how close its images are
    to those of ``compare``."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt is empty; say what to draw")
    asked = [(compare, "packed")] if compare else []
    asked.append((model, weights))
    for name, form in asked:
        named_models.weights_of(name, form)  # checks both before either is loaded
    columns = {}
    for name, form in asked:
        pipe = named_models.open_pipeline(name, device, compile=compile, weights=form, dtype=dtype)
        kind = ("quantized" if form == "packed" else form) if named_models.is_quantized(name) else "float"
        images = fidelity.generate(pipe, prompts, [seed], batch_size=batch_size, progress=name, **call)
        columns[f"{name} ({kind})"] = images[0]
    plots.save(plots.comparison(columns, prompts), out)
    if compare:
        drawn = list(columns.values())
        psnr, ssim = metrics.psnr(drawn[-1], drawn[0]), metrics.ssim(drawn[-1], drawn[0])
        rows = [[p, f"{a:.2f}", f"{b:.3f}"] for p, a, b in zip(prompts, psnr, ssim, strict=True)]
        print(markdown_table(["prompt", "PSNR, dB", "SSIM"], rows))
    print(f"picture: {out}")
