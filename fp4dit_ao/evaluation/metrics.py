"""Image metrics against originals (PSNR, SSIM), and means with 95 % intervals.

Quality is compared at equal prompts and seeds. The images of one prompt resemble each other, so the sampling unit is
the
*prompt*: intervals come from a bootstrap that resamples prompts and keeps all seeds of each together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Images = NDArray[np.uint8]

PSNR_CAP = 100.0
"""PSNR in dB of identical images, instead of infinity; an error of half a grey level everywhere gives 54 dB."""
RESAMPLES = 4000
"""Bootstrap resamples per interval."""
BOOTSTRAP_SEED = 0
_CHUNK = 64
"""Images that are compared together, to bound memory."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2, percent: bool = False) -> str:
        """Formats the estimate, such as ``"25.31 (24.80 to 25.85)"``; ``percent`` multiplies by 100."""
        factor = 100 if percent else 1
        value, low, high = (f"{factor * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value}{' %' if percent else ''} ({low} to {high})"


def psnr(images: Images, originals: Images) -> Floats:
    """Peak signal-to-noise ratio of each image in dB, at most :data:`PSNR_CAP`.

    Args:
        images: uint8 ``(..., h, w, 3)``.
        originals: uint8, of the same shape.

    Returns:
        float64 ``(...)``.

    Raises:
        ValueError: the shapes differ.
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
    # float64, since SSIM subtracts squares: in float32 the SSIM of two identical white images is below 1
    flat, flat_originals = (x.reshape(-1, *x.shape[-3:]) for x in (images, originals))
    parts = []
    for start in range(0, len(flat), _CHUNK):
        pair = (x[start : start + _CHUNK].transpose(0, 3, 1, 2).astype(np.float64) for x in (flat, flat_originals))
        parts.append(chunk(*pair))
    return np.concatenate(parts).reshape(images.shape[:-3])


def estimate(values: NDArray[np.generic]) -> Estimate:
    """Mean and 95 % percentile-bootstrap interval over prompts; equal values give equal intervals (fixed seed).

    Args:
        values: ``(seeds, prompts)``, float or bool. A proportion that is 0 or 1 throughout gets the Wilson interval of
            its number of prompts, since resampling would call it certain. A single prompt has no interval: its ends are
            the value.

    Raises:
        ValueError: ``values`` is empty or has another number of dimensions.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(f"values must have shape (seeds, prompts), found {numbers.shape}")
    by_prompt = numbers.mean(axis=0)
    value, count = float(by_prompt.mean()), len(by_prompt)
    if values.dtype == np.bool_ and value in (0.0, 1.0):
        interval = stats.binomtest(round(value * count), count).proportion_ci(method="wilson")
    elif count == 1:
        return Estimate(value, value, value)
    else:
        interval = stats.bootstrap(
            (by_prompt,), np.mean, n_resamples=RESAMPLES, method="percentile",
            random_state=np.random.default_rng(BOOTSTRAP_SEED),
        ).confidence_interval  # fmt: skip
    return Estimate(value, float(interval.low), float(interval.high))
