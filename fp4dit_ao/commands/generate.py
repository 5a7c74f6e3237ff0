"""``fp4dit-ao generate``: prompts into one picture, beside another model's if asked."""

from pathlib import Path
from typing import Any

from fp4dit_ao import evaluate, metrics, models, picture


def generate(
    model: str, prompts: list[str], out: Path, compare: str | None, seed: int, steps: int | None, batch_size: int,
    compile: bool, device: str | None,
) -> None:  # fmt: skip
    """Draw ``prompts`` with one seed; with ``compare``, print how close the two models' images are."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt is empty; say what to draw")
    call: dict[str, Any] = {"batch_size": batch_size} | ({} if steps is None else {"num_inference_steps": steps})
    names = [compare, model] if compare else [model]
    for name in names:
        models.folder_of(name)  # both, before either is loaded
    columns = {}
    for name in names:
        pipe = models.open_pipeline(name, device, compile=compile)
        columns[name] = evaluate.generate(pipe, prompts, [seed], progress=name, **call)[0]
    labels = {name: f"{name} ({'quantized' if models.is_quantized(name) else 'float'})" for name in names}
    picture.save(picture.comparison({labels[name]: images for name, images in columns.items()}, prompts), out)
    if compare:
        psnr = metrics.psnr(columns[model], columns[compare])
        ssim = metrics.ssim(columns[model], columns[compare])
        rows = [[p, f"{a:.2f}", f"{b:.3f}"] for p, a, b in zip(prompts, psnr, ssim, strict=True)]
        print(evaluate.markdown_table(["prompt", "PSNR, dB", "SSIM"], rows))
    print(f"picture: {out}")
