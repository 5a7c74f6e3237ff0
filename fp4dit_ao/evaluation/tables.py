"""The tables of an evaluation, as titles and cells."""

from typing import TYPE_CHECKING

import numpy as np

from fp4dit_ao.evaluation.metrics import Estimate

if TYPE_CHECKING:
    from fp4dit_ao.evaluation.fidelity import Evaluation, Fidelity

Table = tuple[list[str], list[list[str]]]
"""Titles of the columns, and rows of as many cells."""
NOTHING = ""


def variants_table(evaluation: "Evaluation") -> Table:
    """One row a variant: notes, PSNR, SSIM, every score with its interval, every distance, and seconds."""
    variants = evaluation.variants
    judged = any(variant.right is not None for variant in variants)
    notes = list(dict.fromkeys(name for variant in variants for name in variant.notes))
    scores = list(dict.fromkeys(title for variant in variants for title in variant.scores))
    distances = list(dict.fromkeys(title for variant in variants for title in variant.distances))

    def cells(variant: "Fidelity") -> list[str]:
        e = variant.estimates()
        row = [variant.name, *(variant.notes.get(name, NOTHING) for name in notes)]
        row += ["identical" if variant.identical else e["psnr"].text(2), e["ssim"].text(3)]
        row += [_text(e.get("accuracy"), 1, percent=True)] if judged else []
        row += [_text(e.get(title), evaluation.digits.get(title, 3)) for title in scores]
        row += [_number(variant.distances.get(title), evaluation.digits.get(title, 3)) for title in distances]
        return [*row, _number(variant.seconds, 2)]

    head = ["", *notes, "PSNR, dB", "SSIM", *(["prompt accuracy"] if judged else []), *scores, *distances, "s / image"]
    return head, [cells(variant) for variant in variants]


def differences_table(evaluation: "Evaluation") -> Table:
    """One row a comparison: mean paired differences, with their intervals."""
    comparisons = evaluation.comparisons
    judged = any(variant.right is not None for variant in evaluation.variants)
    scores = list(dict.fromkeys(title for comparison in comparisons for title in comparison.scores))
    head = ["paired difference", "PSNR, dB", "SSIM", *(["prompt accuracy"] if judged else []), *scores]
    rows = [
        [f"{c.first} − {c.second}", _text(c.psnr, 2), _text(c.ssim, 4)]
        + ([_text(c.accuracy, 1, percent=True)] if judged else [])
        + [_text(c.scores.get(title), evaluation.digits.get(title, 3) + 1) for title in scores]
        for c in comparisons
    ]
    return head, rows


def _text(estimate: Estimate | None, digits: int, percent: bool = False) -> str:
    return NOTHING if estimate is None else estimate.text(digits, percent)


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None or np.isnan(value) else f"{value:.{digits}f}"
