"""Scale searches: how the scale of every block of a weight is found. :data:`SEARCHES` has them by name."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp4dit_ao.config.quant_config import SEARCHES_ON_DATA, WEIGHT_SEARCHES
from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.candidate_search import best_candidate, squared_error
from fp4dit_ao.observers.four_over_six import four_over_six
from fp4dit_ao.observers.outlier_cut import outlier_cut
from fp4dit_ao.observers.row_chunks import rows_at_once
from fp4dit_ao.ops import choose_scale, fake_quantize, full_block, to_scale_dtype
from fp4dit_ao.util.registry import Registry


class ScaleSearch(Protocol):
    """A function of a weight that gives the scale of every block.

    The weight observer calls it in its first forward, and once more for each further candidate format, with a detached weight
    that is never a fake tensor. It must be deterministic: a run that resumes, and the module form, which quantizes without a
    graph, must find the same scales.
    """

    def __call__(
        self, weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype, /
    ) -> Tensor:
        """Finds the scales.

        Args:
            weight: float ``(out_features, in_features)``, finite, of any float type and device; not to be changed.
            block_size: torchao's: how many rows and columns share a scale, -1 for all.
            fmt: format whose levels, times the scale, stand for the weight.
            scale_dtype: float type in which scales are stored. A search judges scales as they are after rounding to it.

        Returns:
            ``scale_dtype`` ``(out_features / block_size[0], in_features / block_size[1])`` on the weight's device; every scale
            positive and finite, of blocks of zeros, too (``ops.to_scale_dtype`` sees to that).
        """


class InputSearch(Protocol):
    """A :class:`ScaleSearch` that looks at inputs, too, as soon as calibration has seen some: then it is called once more."""

    def __call__(
        self,
        weight: Tensor,
        block_size: Sequence[int],
        fmt: NumberFormat,
        scale_dtype: torch.dtype,
        importance: Tensor | None = None,
        /,
    ) -> Tensor:
        """Finds the scales.

        Args:
            weight, block_size, fmt, scale_dtype: see :class:`ScaleSearch`.
            importance: float32 ``(in_features,)``, how often the error of each input's weights counts, about its mean square
                relative to that of all inputs; None before there is data.
        """


SWEEP = torch.linspace(0.1, 1.2, 111).tolist()
"""Fractions of absmax that LowBit-FP tries."""
CLIPS = torch.linspace(0.4, 1.2, 81).tolist()
"""Fractions of absmax that the search tries; more than 1 lets the second-largest levels carry more of the group."""


def absmax(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """The largest magnitude on the largest level (the paper's choice)."""
    return choose_scale(weight, block_size, str(fmt), scale_dtype)


def mse(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """Per block, the scale among :data:`CLIPS` of absmax whose rounding has the least squared error; of equals, absmax.

    Source: the clip search of arXiv 2408.06995 (LBFP), with its 0.1 to 1.2 grid narrowed to where minima occur.
    """
    return _least_squares(weight, block_size, fmt, scale_dtype, CLIPS)


def weighted_mse(
    weight: Tensor,
    block_size: Sequence[int],
    fmt: NumberFormat,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Tensor:
    """Like :func:`mse`, with each weight's squared error multiplied by the mean square of its input.

    That is the error of outputs, ``tr(E G E^T)`` with G the Gram matrix of the inputs, but for what two inputs have in common.
    """
    if importance is None:
        return mse(weight, block_size, fmt, scale_dtype)
    rows = rows_at_once(weight) if block_size[0] == 1 else len(weight)
    found = []
    for part in weight.split(rows):
        base = choose_scale(part, block_size, str(fmt), torch.float32)
        best = to_scale_dtype(base, scale_dtype)
        least = _block_errors(part, block_size, best, fmt, importance)
        for fraction in CLIPS:
            scale = to_scale_dtype(base * fraction, scale_dtype)
            error = _block_errors(part, block_size, scale, fmt, importance)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        found.append(best)
    return torch.cat(found)


def _block_errors(
    weight: Tensor, block_size: Sequence[int], scale: Tensor, fmt: NumberFormat, importance: Tensor
) -> Tensor:
    """Squared error of every block, shaped like ``scale``."""
    values = fake_quantize(weight, list(block_size), scale, str(fmt), torch.float32)
    errors = (values - weight.float()).square() * importance.to(weight.device)
    height, width = full_block(weight.shape, list(block_size))
    return errors.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3))


def lowbit_fp(weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype) -> Tensor:
    """Like :func:`mse`, over all of LowBit-FP's 111 fractions from 0.1 to 1.2 (arXiv 2408.06995).

    A fraction c of absmax is the paper's real-valued exponent bias, ``b = 2^E - log2 c + …``. There a tensor has one, which
    ``weight_granularity="tensor"`` gives; its choice among encodings is ``weight_candidates``, here by the output's error. The
    sweep down to 0.1 matters where the few largest of very many values would stretch the scale. Block formats, whose scales
    follow from absmax, and codebook groups, which search for both at once, have no use for it.
    """
    return _least_squares(weight, block_size, fmt, scale_dtype, SWEEP)


def _least_squares(
    weight: Tensor, block_size: Sequence[int], fmt: NumberFormat, scale_dtype: torch.dtype, fractions: Sequence[float]
) -> Tensor:
    rows = rows_at_once(weight) if block_size[0] == 1 else len(weight)
    found = []
    for part in weight.split(rows):
        base = choose_scale(part, block_size, str(fmt), torch.float32)
        scales = torch.stack([to_scale_dtype(base * fraction, scale_dtype) for fraction in (1.0, *fractions)])
        found.append(scales.gather(0, best_candidate(part, block_size, scales, fmt)[None]).squeeze(0))
    return torch.cat(found)


__all__ = [
    "CLIPS",
    "SEARCHES",
    "SWEEP",
    "InputSearch",
    "ScaleSearch",
    "absmax",
    "four_over_six",
    "lowbit_fp",
    "mse",
    "outlier_cut",
    "register_input_search",
    "register_search",
    "squared_error",
    "weighted_mse",
]

SEARCHES: Registry[ScaleSearch] = Registry("scale search")
"""By the name that ``QuantConfig.weight_search`` and ``WeightObserver(search=...)`` take."""


INPUT_SEARCHES: dict[str, InputSearch] = {}
"""Those of :data:`SEARCHES` that look at inputs."""


def register_search(name: str, search: ScaleSearch, *, summary: str, source: str = "", cost: str = "") -> ScaleSearch:
    """Makes ``search`` known to observers and configs as ``name``, and returns it. See ``Registry.register``.

    Raises:
        ValueError: another search has this name.
    """
    SEARCHES.register(name, search, summary=summary, source=source, cost=cost)
    if name not in WEIGHT_SEARCHES:
        WEIGHT_SEARCHES.append(name)
    return search


def register_input_search(
    name: str, search: InputSearch, *, summary: str, source: str = "", cost: str = ""
) -> InputSearch:
    """:func:`register_search` of one that looks at inputs: weights are searched once more when they are known."""
    register_search(name, search, summary=summary, source=source, cost=cost)
    INPUT_SEARCHES[name] = search
    if name not in SEARCHES_ON_DATA:
        SEARCHES_ON_DATA.append(name)
    return search


register_search(
    "absmax",
    absmax,
    summary="The largest magnitude of a block on the largest level",
    source="arXiv 2503.15465, eq. 6-8",
)
register_search(
    "mse",
    mse,
    summary="Of 81 fractions of absmax the one with the least squared error",
    source="arXiv 2408.06995, section 3 (clip search)",
    cost="seconds a model",
)
register_input_search(
    "weighted_mse",
    weighted_mse,
    summary="Like mse, each weight's error weighted by the mean square of its input",
    cost="calibration, then seconds a model; codebook groups, too",
)
register_search(
    "lowbit_fp",
    lowbit_fp,
    summary="Of 111 fractions of absmax, from 0.1 on, the one with the least squared error",
    source="LowBit-FP, arXiv 2408.06995",
    cost="seconds a model",
)
register_search(
    "four_over_six",
    four_over_six,
    summary="The largest magnitude of a block of E2M1 on 6, the largest value, or on 4, whichever errs less",
    source="Four over six, arXiv 2512.02010",
    cost="seconds a model",
)
register_search(
    "outlier_cut",
    outlier_cut,
    summary="Absmax, with the weight's outliers truncated where its largest magnitudes come apart",
    source="CBQ, arXiv 2312.07950, its pre-processing",
    cost="a sort of each weight",
)
