"""Q-GaLore (arXiv 2407.08296): Adam on gradients projected to a low rank, with INT4 projections, for weights in INT8.

    P = the r leading singular vectors of G on its shorter side, anew every T steps
    W <- SR(W - lr * a * back(Adam(project(G))))

with ``project(G) = G P^T`` (or ``P^T G``), ``back`` its transpose, a = 0.25, and SR stochastic rounding to INT8
(:mod:`~fp4dit_ao.passes.fine_tuning.int8_latent`). P is stored in INT4, in groups of 256, the moments in 8 bits. A gradient
is projected as soon as it is there, so that no two layers' gradients exist at a time.

*Lazy subspaces*: after each decomposition the first singular vector is compared with the last one. If the mean of the last five
cosines is at least 0.4, the layer's T doubles. A singular vector's sign is arbitrary; magnitudes of cosines are taken here,
where the authors' code takes cosines. Where samples of a batch come one by one, P is found from the first one's gradient.
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fp4dit_ao.passes.fine_tuning import eight_bit_moments
from fp4dit_ao.passes.fine_tuning.eight_bit_moments import Moment
from fp4dit_ao.passes.fine_tuning.int8_latent import Int8Latent
from fp4dit_ao.passes.fine_tuning.training_state import State

SCALE = 0.25
"""a, the code's default."""
QUEUE, THRESHOLD = 5, 0.4
"""Cosines that are remembered, and the mean from which a subspace counts as settled."""
BETAS, EPS = (0.9, 0.999), 1e-20
"""Adam's; gradients here are far below the usual epsilon, 1e-8."""
GROUP, CODES = 256, 2**4 - 1
"""Values of a projection that share a scale, and the largest INT4 code."""


class Projection:
    """An INT4 matrix, two codes a byte.

    Args:
        parts: ``codes``, uint8; ``scale`` and ``zero``, float32 ``(groups, 1)``.
        shape: of the matrix.
    """

    def __init__(self, parts: dict[str, Tensor], shape: Sequence[int]):
        self.parts, self.shape = parts, tuple(shape)

    @classmethod
    def of(cls, matrix: Tensor) -> "Projection":
        """A float matrix, rounded to nearest."""
        grouped = matrix.float().reshape(-1, math.gcd(matrix.numel(), GROUP))
        low, high = grouped.amin(1, keepdim=True).clamp(max=0), grouped.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / CODES).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round()
        codes = ((grouped / scale).round() + zero).clamp(0, CODES).to(torch.uint8).flatten()
        pairs = F.pad(codes, (0, len(codes) % 2)).reshape(-1, 2)
        return cls({"codes": pairs[:, 0] | pairs[:, 1] << 4, "scale": scale, "zero": zero}, matrix.shape)

    def matrix(self) -> Tensor:
        """The matrix, float32."""
        packed, scale, zero = (self.parts[name] for name in ("codes", "scale", "zero"))
        codes = torch.stack([packed & CODES, packed >> 4], 1).flatten()[: math.prod(self.shape)]
        return ((codes.reshape(len(scale), -1).float() - zero) * scale).reshape(self.shape)


class Layer:
    """The optimizer's state for one weight.

    Args:
        latent: the weight.
        rate: learning rate, in weight units.
        rank: r; at most the shorter side.
        gap: T at first.
        seed: of stochastic rounding.
    """

    def __init__(self, latent: Int8Latent, rate: float, rank: int, gap: int, seed: int):
        self.latent, self.rate, self.gap, self.seed = latent, rate, gap, seed
        rows, columns = latent.codes.shape
        self.right = rows >= columns
        self.rank = min(rank, rows, columns)
        self.taken = 0
        self.projection: Projection | None = None
        self.moments: list[Moment] = []
        self.cosines: deque[float] = deque(maxlen=QUEUE)
        self.first: Tensor | None = None
        self.gradient: Tensor | None = None
        latent.receive = self.receive

    @torch.no_grad()
    def receive(self, gradient: Tensor) -> None:
        """Adds one backward pass's gradient, ``(rows, columns)``, projected."""
        if self.projection is None or (self.gradient is None and self.taken % self.gap == 0):
            self._decompose(gradient)
        low = self._project(gradient)
        self.gradient = low if self.gradient is None else self.gradient + low

    def _decompose(self, gradient: Tensor) -> None:
        left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
        matrix = right[: self.rank] if self.right else left[:, : self.rank]
        first = matrix[0] if self.right else matrix[:, 0]
        if self.first is not None:
            self.cosines.append(abs(float(F.cosine_similarity(self.first, first, dim=0))))
            if len(self.cosines) == QUEUE and sum(self.cosines) / QUEUE >= THRESHOLD:
                self.gap *= 2
        self.first, self.projection = first.clone(), Projection.of(matrix)

    def _project(self, gradient: Tensor) -> Tensor:
        assert self.projection is not None
        matrix = self.projection.matrix()
        return gradient.float() @ matrix.T if self.right else matrix.T @ gradient.float()

    def _back(self, low: Tensor) -> Tensor:
        assert self.projection is not None
        matrix = self.projection.matrix()
        return low @ matrix if self.right else matrix @ low

    @torch.no_grad()
    def step(self, pace: float) -> None:
        """Adds Adam's step on what was received, and forgets it."""
        if self.gradient is None:
            return
        low, self.gradient = self.gradient, None
        self.taken += 1
        signs, olds = (True, False), [torch.zeros_like(low)] * 2
        if self.moments:
            olds = [eight_bit_moments.restore(x, signed) for x, signed in zip(self.moments, signs, strict=True)]
        news = [old * beta + x * (1 - beta) for old, beta, x in zip(olds, BETAS, (low, low.square()), strict=True)]
        self.moments = [eight_bit_moments.store(x, signed) for x, signed in zip(news, signs, strict=True)]
        first, second = (x / (1 - beta**self.taken) for x, beta in zip(news, BETAS, strict=True))
        update = self._back(first / (second.sqrt() + EPS)) * (-SCALE * self.rate * pace)
        generator = torch.Generator(update.device).manual_seed(self.seed * 1_000_003 + self.taken)
        self.latent.add(update, generator)

    def state(self) -> State:
        """All that a resumed run needs, but the weight."""
        return {
            "taken": self.taken, "gap": self.gap, "cosines": list(self.cosines), "first": self.first,
            "projection": None if self.projection is None else self.projection.parts,
            "shape": None if self.projection is None else list(self.projection.shape),
            "moments": [list(moment) for moment in self.moments],
        }  # fmt: skip

    def restore(self, state: State) -> None:
        """Goes on from what :meth:`state` gave."""
        device = self.latent.codes.device
        self.taken, self.gap = state["taken"], state["gap"]
        self.cosines.extend(state["cosines"])
        self.first = None if state["first"] is None else state["first"].to(device)
        if state["projection"] is not None:
            parts = {name: x.to(device) for name, x in state["projection"].items()}
            self.projection = Projection(parts, state["shape"])
        self.moments = [Moment(*(x.to(device) for x in moment)) for moment in state["moments"]]


class QGaLore:
    """The optimizer of many weights.

    Args:
        latents: each weight with its learning rate.
        rank: r; None takes a quarter of each weight's shorter side, as in the paper's models.
        gap: T at first.
        seed: of stochastic rounding.
    """

    def __init__(self, latents: Sequence[tuple[Int8Latent, float]], rank: int | None, gap: int, seed: int):
        self.layers = [
            Layer(latent, rate, rank or max(1, min(latent.codes.shape) // 4), gap, seed * 100_003 + number)
            for number, (latent, rate) in enumerate(latents)
        ]

    def zero_grad(self) -> None:
        for layer in self.layers:
            layer.gradient = None

    def step(self, pace: float) -> None:
        for layer in self.layers:
            layer.step(pace)

    def state(self) -> State:
        return [layer.state() for layer in self.layers]

    def restore(self, state: State) -> None:
        for layer, own in zip(self.layers, state, strict=True):
            layer.restore(own)
