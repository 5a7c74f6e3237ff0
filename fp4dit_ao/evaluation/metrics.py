"""How close images are to their originals, and how sure the answer is.

Quality is compared at equal prompts and seeds. The images of one prompt resemble each other, so the unit that is drawn
at random is the *prompt*: intervals come from a bootstrap that resamples prompts and keeps all seeds of each together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Images = NDArray[np.uint8]

PSNR_CAP = 100.0
"""dB given to identical images, whose PSNR is infinite; half a grey level of error everywhere gives 54 dB."""
RESAMPLES = 4000
BOOTSTRAP_SEED = 0
_CHUNK = 64


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2, percent: bool = False) -> str:
        """``"25.31 (24.80 to 25.85)"``."""
        factor = 100 if percent else 1
        value, low, high = (f"{factor * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value}{' %' if percent else ''} ({low} to {high})"


def psnr(images: Images, originals: Images) -> Floats:
    """Peak signal-to-noise ratio of each image in dB, at most :data:`PSNR_CAP`.

    Args:
        images: uint8 ``(..., h, w, 3)``.
        originals: the same shape.

    Returns:
        ``(...)``.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def chunk(a: Floats, b: Floats) -> Floats:
        import torch

        ratio = peak_signal_noise_ratio(
            torch.from_numpy(a), torch.from_numpy(b), data_range=255.0, reduction="none", dim=(1, 2, 3)
        )
        capped: Floats = np.minimum(ratio.double().numpy(), PSNR_CAP)
        return capped

    return _per_image(chunk, images, originals)


def ssim(images: Images, originals: Images) -> Floats:
    """Structural similarity of each image (Wang et al. 2004: Gaussian window, σ = 1.5); arguments as :func:`psnr`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def chunk(a: Floats, b: Floats) -> Floats:
        import torch

        value = structural_similarity_index_measure(
            torch.from_numpy(a), torch.from_numpy(b), data_range=255.0, reduction="none"
        )
        return np.atleast_1d(value.double().numpy())

    return _per_image(chunk, images, originals)


def _per_image(chunk: Callable[..., Floats], images: Images, originals: Images) -> Floats:
    if images.shape != originals.shape:
        raise ValueError(
            f"images of shape {images.shape} cannot be compared with originals of shape {originals.shape}; "
            "generate both with the same prompts, seeds and size"
        )
    # float64: SSIM subtracts squares, and float32 calls two identical white squares different
    flat, flat_originals = (x.reshape(-1, *x.shape[-3:]) for x in (images, originals))
    parts = []
    for start in range(0, len(flat), _CHUNK):
        pair = (x[start : start + _CHUNK].transpose(0, 3, 1, 2).astype(np.float64) for x in (flat, flat_originals))
        parts.append(chunk(*pair))
    return np.concatenate(parts).reshape(images.shape[:-3])


def estimate(values: NDArray[np.generic]) -> Estimate:
    """Mean and 95 % percentile-bootstrap interval over prompts.

    Args:
        values: ``(seeds, prompts)``, float or bool. A proportion that is 0 or 1 throughout gets the Wilson interval of
            its number of prompts, since resampling would call it certain.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(f"values must have shape (seeds, prompts), found {numbers.shape}")
    by_prompt = numbers.mean(axis=0)
    value = float(by_prompt.mean())
    if values.dtype == np.bool_ and value in (0.0, 1.0):
        low, high = wilson(round(value * len(by_prompt)), len(by_prompt))
        return Estimate(value, low, high)
    random = np.random.default_rng(BOOTSTRAP_SEED)
    means = by_prompt[random.integers(len(by_prompt), size=(RESAMPLES, len(by_prompt)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (E. B. Wilson, 1927)."""
    z = 1.959964
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
