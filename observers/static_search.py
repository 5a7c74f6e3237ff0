"""A static range and format for an input, searched for the least squared error on a reservoir of values (LowBit-FP)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.kernels.candidate_search import best_candidate, squared_error
from fp4dit_ao.observers.activation import StaticActivationObserver
from fp4dit_ao.observers.base import known
from fp4dit_ao.observers.scale_search import SWEEP
from fp4dit_ao.ops import choose_scale

CALLS, VALUES = 64, 1024
"""Calls of the model that the reservoir holds values of, and how many of each."""


class SearchedActivationObserver(StaticActivationObserver):
    """One range for the whole tensor, and the format, that round what was seen in calibration with the least squared error.

    Source: LowBit-FP (arXiv 2408.06995): each tensor has an encoding and a bias of its own, chosen among 111 biases for each
    encoding, by the squared error on values that the full-precision model had at timesteps drawn evenly. A bias is a range: 0.1
    to 1.2 times the largest magnitude. The largest magnitude itself is one more candidate, and kept where no other errs less.
    (The paper's text was not at hand; grid and criterion are those of the FP8 code that it builds on.)

    Values are kept of ``CALLS`` calls, all with the same chance however many there are (algorithm R), evenly spread over each
    call's tensor.

    Args:
        fmt: the format, or several to choose among.
        name: of the tensor, for messages and the buffer of its scale.
        collect_gram: whether ``X^T X`` is accumulated.

    Attributes:
        fmt: the chosen format, once :meth:`scale` was asked for.
        candidates: the formats.
    """

    def __init__(
        self,
        fmt: str | NumberFormat | Sequence[str | NumberFormat],
        name: str = "activation",
        collect_gram: bool = False,
        **spec: object,
    ):
        candidates = tuple(known(f) for f in ([fmt] if isinstance(fmt, str | NumberFormat) else fmt))
        super().__init__(candidates[0], name, collect_gram, **spec)
        self.candidates = candidates
        self._kept: list[Tensor] = []
        self._calls = 0
        self._random = torch.Generator().manual_seed(0)
        self._found: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        self._found = None
        values = x.flatten()
        count = min(VALUES, len(values))
        kept = values[(torch.arange(count, device=x.device) * 2 + 1) * len(values) // (2 * count)].float()
        self._calls += 1
        if len(self._kept) < CALLS:
            self._kept.append(kept)
            return
        slot = int(torch.randint(self._calls, (), generator=self._random))
        if slot < CALLS:
            self._kept[slot] = kept

    def _calibrated_scale(self, rank: int) -> Tensor:
        """Chooses the format, too."""
        if self._found is None:
            largest = super()._calibrated_scale(2)  # or its error
            values = torch.cat([x.to(largest.device) for x in self._kept])[None]
            found = [self._least(values, fmt) for fmt in self.candidates]
            best = min(range(len(found)), key=lambda index: found[index][0])
            self.fmt, self._found = self.candidates[best], found[best][1]
        return self._found.reshape([1] * rank)

    def _least(self, values: Tensor, fmt: NumberFormat) -> tuple[float, Tensor]:
        """The least squared error of ``values`` ``(1, n)`` in a format, and its scale ``(1, 1)``."""
        base = choose_scale(self.absmax.to(values.device).reshape(1, 1), [-1, -1], str(fmt), torch.float32)
        scales = torch.stack([base * fraction for fraction in (1.0, *SWEEP)])
        scale = scales[best_candidate(values, [-1, -1], scales, fmt).flatten()[0]]
        return float(squared_error(values, [-1, -1], fmt, scale)), scale
