"""One HTML file with an evaluation's tables, its worst images under sliders, and what it was measured on."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity
from fp4dit_ao.evaluation.kept_images import KeptImages
from fp4dit_ao.evaluation.metrics import Floats, Images
from fp4dit_ao.evaluation.tables import differences_table, variants_table
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

SHOWN = 24
"""Images of each variant in a report, unless another number is given."""
_LARGEST, _SMALL = 768, 256
"""Longest side of a shown image; up to which side it is a PNG whose pixels stay sharp."""
_TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Measure:
    """A number of every image that a report can sort by."""

    key: str
    title: str
    higher: bool
    digits: int

    def values(self, variant: Fidelity) -> Floats | None:
        """Those of one variant, ``(seeds, prompts)``; None if it has none."""
        return {"psnr": variant.psnr, "ssim": variant.ssim, **variant.scores}.get(self.key)


def measures(evaluation: Evaluation, higher_is_better: Mapping[str, bool]) -> list[Measure]:
    """PSNR, SSIM and every score of an evaluation."""
    titles = dict.fromkeys(title for variant in evaluation.variants for title in variant.scores)
    found = [Measure("psnr", "PSNR, dB", True, 2), Measure("ssim", "SSIM", True, 3)]
    return found + [
        Measure(title, title, higher_is_better.get(title, True), evaluation.digits.get(title, 3)) for title in titles
    ]


def worst(variant: Fidelity, by: Sequence[Measure], count: int) -> list[tuple[int, int]]:
    """Positions (seed, prompt) of ``count`` images: the worst by each measure in turn."""
    orders = []
    for measure in by:
        values = measure.values(variant)
        if values is not None:
            order = np.argsort((values if measure.higher else -values).ravel(), kind="stable")
            orders.append([(int(flat) // values.shape[1], int(flat) % values.shape[1]) for flat in order])
    taken: dict[tuple[int, int], None] = {}
    for same_rank in zip(*orders, strict=True):
        for position in same_rank:
            if len(taken) < count:
                taken[position] = None
    return list(taken)


def write_report(
    path: Path,
    evaluation: Evaluation,
    kept: Sequence[KeptImages],
    prompts: Sequence[str],
    seeds: Sequence[int],
    higher_is_better: Mapping[str, bool],
    shown: int = SHOWN,
) -> None:
    """Writes the report, whole or not at all. It needs no other file and asks for none.

    Args:
        path: the HTML file.
        evaluation: its first variant is the original.
        kept: images of each variant.
        prompts: texts.
        seeds: as they are named.
        higher_is_better: by title of a score.
        shown: images of each variant; the worst.
    """
    by = measures(evaluation, higher_is_better)
    others = evaluation.variants[1:]
    places: dict[tuple[int, int], set[int]] = {}
    for number, variant in enumerate(others):
        for position in worst(variant, by, shown):
            places.setdefault(position, set()).add(number)
    cases = []
    for (seed, prompt), numbers in sorted(places.items()):
        cases.append(
            {
                "prompt": prompts[prompt],
                "seed": seeds[seed],
                "original": _embedded(kept[0].read(seed, prompt)),
                "images": [
                    _embedded(images.read(seed, prompt)) if number in numbers else None
                    for number, images in enumerate(kept[1:])
                ],
                "values": [_values(variant, by, seed, prompt) for variant in others],
            }
        )  # fmt: skip
    height, width = kept[0].read(0, 0).shape[-3:-1]
    tables = [("Means", variants_table(evaluation))]
    if evaluation.comparisons:
        tables.append(("Paired differences", differences_table(evaluation)))
    data = {
        "title": " against ".join([others[0].name if others else "", evaluation.variants[0].name]),
        "subtitle": "At equal prompts and seeds, with 95 % intervals over prompts.",
        "original": evaluation.variants[0].name,
        "variants": [variant.name for variant in others],
        "metrics": [vars(measure) for measure in by],
        "tables": [
            {"title": title, "head": head, "rows": rows, "markdown": markdown_table(head, rows)}
            for title, (head, rows) in tables
        ],
        "cases": cases,
        "total": len(kept[0]),
        "small": max(height, width) <= _SMALL,
        "settings": {name: str(value) for name, value in evaluation.settings.items() if not isinstance(value, list)},
        "environment": evaluation.environment,
    }
    # inside of a script element, "<" could end it
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    write_text(path, _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text))


def _values(variant: Fidelity, by: Sequence[Measure], seed: int, prompt: int) -> dict[str, float]:
    found = {measure.key: measure.values(variant) for measure in by}
    return {key: float(values[seed, prompt]) for key, values in found.items() if values is not None}


def _embedded(pixels: Images) -> str:
    """An image as data URI: PNG if it is small, else JPEG of at most :data:`_LARGEST` pixels; a video as animated WebP."""
    from PIL import Image

    if pixels.ndim == 4:
        return _animated(pixels)
    image, small = Image.fromarray(pixels), max(pixels.shape[:2]) <= _SMALL
    image.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    image.save(file, format="PNG" if small else "JPEG", **({} if small else {"quality": 90}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _animated(video: Images) -> str:
    """A video as data URI: animated WebP of at most half of :data:`_LARGEST` pixels, ten frames a second."""
    from PIL import Image

    frames, file = [Image.fromarray(frame) for frame in video], io.BytesIO()
    for frame in frames:
        frame.thumbnail((_LARGEST // 2, _LARGEST // 2))
    frames[0].save(
        file, format="WEBP", save_all=True, append_images=frames[1:], duration=100, loop=0, quality=85, method=2
    )
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
