"""Plug-in point "sample selection": which transformer calls of which batch of prompts become calibration samples.

:data:`SELECTIONS` lists the methods by name; :func:`fp4dit_ao.collect_samples`, :func:`fp4dit_ao.quantize_pipeline` and
``fp4dit-ao quantize`` take such a name. A new method is one :class:`SampleSelection`, registered here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4dit_ao.util.registry import Registry

Chosen = dict[int, list[int]]
"""Numbers of the chosen transformer calls, ascending, by number of the batch of prompts."""


class SampleSelection(Protocol):
    """Chooses calibration samples among the cells of a table: one row per batch of prompts, one column per transformer
    call.

    Attributes:
        needs_features: whether the choice depends on what the model computes. If so, the first batch's trajectory is
            run with a hook on the middle transformer block, and its pooled outputs are passed as ``features``.
    """

    @property
    def needs_features(self) -> bool: ...

    def __call__(self, calls: int, batches: int, samples: int, features: Tensor | None = None) -> Chosen:
        """Chooses exactly ``samples`` cells; the same for equal arguments (no global random state).

        Args:
            calls: transformer calls of one trajectory, at least 1. Call 0 is the noisiest timestep. Pipelines that do
                not batch guidance make two calls per timestep.
            batches: batches of prompts, at least 1; each is one trajectory.
            samples: wanted number of cells, from 1 to ``calls * batches``.
            features: float32 ``(calls, n)``, the output of the middle transformer block in every call of the first
                batch, averaged over tokens; None unless :attr:`needs_features`.

        Returns:
            ``{batch: [call, …]}``: batches from 0 to ``batches - 1``, without those of which nothing is kept; calls
            from 0 to ``calls - 1``, ascending, each at most once.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """Every call equally often (±1, the surplus evenly spread), batches in turn: Q-Diffusion's and FP4DiT's
    calibration."""

    needs_features: bool = False

    def __call__(self, calls: int, batches: int, samples: int, features: Tensor | None = None) -> Chosen:
        """Chooses evenly; see :meth:`SampleSelection.__call__`."""
        return in_turn([(call + 1) * samples // calls - call * samples // calls for call in range(calls)], batches)


@dataclass(frozen=True)
class DensityDiversity:
    """More samples of calls whose features are typical (many others are near) or unlike the others: TDAC of EDA-DM.

    Call t has the weight ``w_t = D_t + diversity * V_t``, both terms scaled to [0, 1] over the calls: the density
    ``D_t = #{j : mse(f_t, f_j) <= radius}`` and the diversity ``V_t = sum_j (1 - cos(f_t, f_j))``.

    Attributes:
        radius: relative to the mean square of all features. (The paper's, 0.3 for LDM-4, is in units of one model's
            features.)
        diversity: weight λ of the diversity; the paper takes 1.0 to 5.0.
    """

    radius: float = 0.3
    diversity: float = 1.0
    needs_features: bool = True

    def __call__(self, calls: int, batches: int, samples: int, features: Tensor | None = None) -> Chosen:
        """Chooses by weights; see :meth:`SampleSelection.__call__`.

        Raises:
            ValueError: ``features`` is missing, or has another number of rows than ``calls``.
        """
        if features is None or len(features) != calls:
            found = "none" if features is None else f"{len(features)}"
            raise ValueError(f"density_diversity needs one row of features for each of {calls} calls, found {found}")
        return in_turn(apportion(self.weights(features).tolist(), samples, batches), batches)

    def weights(self, features: Tensor) -> Tensor:
        """``w_t`` of every call: float64 ``(calls,)``."""
        f = features.double()
        squared = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist").square() / f.shape[1]
        density = (squared <= self.radius * f.square().mean()).sum(1).double()
        diversity = (1 - F.cosine_similarity(f[:, None], f[None], dim=-1)).sum(1)
        return _unit(density) + self.diversity * _unit(diversity)


def _unit(x: Tensor) -> Tensor:
    """``x`` scaled linearly to [0, 1]; zeros if all values are equal."""
    spread = x.max() - x.min()
    return (x - x.min()) / spread if spread > 0 else torch.zeros_like(x)


def apportion(weights: Sequence[float], total: int, most: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that sum to ``total``, each at most ``most``.

    Each is less than 1 from its exact share. What the limit cuts off goes to the others in proportion to their weights,
    and in equal parts if those are all zero.
    """
    quotas = [0.0] * len(weights)
    uncut, left = list(range(len(weights))), total
    while uncut:
        scale = sum(weights[i] for i in uncut)
        for i in uncut:
            quotas[i] = left * (weights[i] / scale if scale > 0 else 1 / len(uncut))
        cut = [i for i in uncut if quotas[i] > most]
        if not cut:
            break
        for i in cut:
            quotas[i] = most
        uncut, left = [i for i in uncut if i not in cut], left - most * len(cut)
    shares = [0] * len(weights)
    for _ in range(total):
        open_ = [i for i, share in enumerate(shares) if share < most]
        shares[max(open_, key=lambda i: quotas[i] - shares[i])] += 1
    return shares


def in_turn(shares: Sequence[int], batches: int) -> Chosen:
    """Spreads ``shares[call]`` samples of each call over batches of prompts, which take turns.

    Args:
        shares: number of samples by call, each at most ``batches``, so that the batches of one call are distinct.
        batches: number of batches of prompts.
    """
    chosen: Chosen = {}
    turn = 0
    for call, share in enumerate(shares):
        for _ in range(share):
            chosen.setdefault(turn % batches, []).append(call)
            turn += 1
    return chosen


def check_chosen(chosen: Mapping[int, Sequence[int]], calls: int, batches: int, samples: int, name: str) -> None:
    """Refuses a choice that breaks the contract of :meth:`SampleSelection.__call__`.

    Raises:
        ValueError: with the name of the method and what is wrong.
    """
    count = sum(map(len, chosen.values()))
    if count != samples:
        raise ValueError(f"sample selection {name!r} chose {count} samples, {samples} were asked for")
    for batch, kept in chosen.items():
        ascending = all(a < b for a, b in pairwise(kept))
        if not 0 <= batch < batches or not kept or not ascending or not 0 <= kept[0] <= kept[-1] < calls:
            raise ValueError(
                f"sample selection {name!r} chose calls {list(kept)} of batch {batch}; give ascending numbers below {calls} "
                f"of batches below {batches}"
            )


SELECTIONS: Registry[SampleSelection] = Registry("sample selection")
"""Sample selections by name."""
SELECTIONS.register(
    "uniform", Uniform(), summary="Every timestep equally often, prompts in turn.",
    source="Q-Diffusion (arXiv 2302.04304); FP4DiT (arXiv 2503.15465)",
)  # fmt: skip
SELECTIONS.register(
    "density_diversity", DensityDiversity(),
    summary="More samples of timesteps whose features are typical of many others, or unlike the others (TDAC).",
    source="EDA-DM (arXiv 2401.04585)", cost="one hook on the first trajectory",
)  # fmt: skip
