"""Errors of the model's output where one layer has a format and all others are in full precision."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from tqdm import tqdm

from fp4dit_ao.formats import NumberFormat
from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.observers.weight import WeightObserver
from fp4dit_ao.passes.fingerprint import fingerprint
from fp4dit_ao.passes.model_error import calls_of, outputs_of, relative_error, teacher, total_error
from fp4dit_ao.util.tensor_state import load_state, save_state
from fp4dit_ao.util.world import current

Metric = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Given the model's outputs and what they should be, a scalar: 0 where they are equal."""

WINDOW = 7
"""Side of the windows in which structures are compared."""
LUMINANCE, CONTRAST = 0.01, 0.03
"""The two constants of SSIM, as parts of the range of values."""


def dissimilarity(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """``1 - SSIM``, in the mean over the tensors (Wang et al. 2004, equation 13), with uniform windows.

    Windows are squares over the last two dimensions of latent images and of frames, channel by channel; in packed latents
    ``(rows, tokens, channels)`` they are stretches of tokens.
    """
    return torch.stack(
        [1 - _ssim(y.float(), wanted.float()) for y, wanted in zip(outputs, targets, strict=True)]
    ).mean()


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    if x.ndim > 3:
        x, y = (z.reshape(-1, 1, *z.shape[-2:]) for z in (x, y))
    else:
        x, y = (z.mT.reshape(-1, 1, 1, z.shape[-2]) for z in (x, y))
    window = [min(WINDOW, size) for size in x.shape[-2:]]
    mean = functools.partial(F.avg_pool2d, kernel_size=window, stride=1)
    of_x, of_y = mean(x), mean(y)
    variances = mean(x * x) - of_x**2 + mean(y * y) - of_y**2
    covariance = mean(x * y) - of_x * of_y
    span = (y.amax() - y.amin()).clamp_min(1e-30)
    c1, c2 = ((constant * span) ** 2 for constant in (LUMINANCE, CONTRAST))
    top = (2 * of_x * of_y + c1) * (2 * covariance + c2)
    return (top / ((of_x**2 + of_y**2 + c1) * (variances + c2))).mean()


METRICS: dict[str, Metric] = {"quality": relative_error, "content": dissimilarity}
"""How far the model's output is from the float model's, by what a layer is responsible for: relative squared error (one over
the signal-to-noise ratio), or one minus structural similarity."""


class Trials:
    """A prepared graph whose layers are quantized one by one, or all, in formats that are tried.

    Args:
        prepared: the graph, calibrated.
        layers: observer and weight of each layer whose format is open, by its name.
        samples: to compare outputs on.
    """

    def __init__(
        self,
        prepared: GraphModule,
        layers: Mapping[str, tuple[WeightObserver, Tensor]],
        samples: Sequence[Mapping[str, object]],
    ):
        self._prepared, self._layers = prepared, layers
        self._calls = calls_of(prepared, samples)
        self._samples = samples
        self._wanted = teacher(prepared, self._calls)

    @torch.no_grad()
    def sensitivities(
        self, groups: Mapping[str, str], folder: str | Path | None = None, progress: bool = False
    ) -> dict[str, list[float]]:
        """The error of the model's output with each of a layer's candidates, by the layer's name.

        Args:
            groups: what each layer is responsible for, a key of :data:`METRICS`.
            folder: what was measured is kept there, layer by layer; a killed run goes on from it.
            progress: show a progress bar with the time left.

        Raises:
            ValueError: the folder holds another run's.
        """
        store = _Store(folder, fingerprint(str(dict(groups)), self._prepared, self._samples)) if folder else None
        found = store.load() if store else {}
        for name, (observer, weight) in tqdm(
            self._layers.items(), desc="sensitivity", unit="layer", disable=not progress
        ):
            if name not in found:
                own = [self._alone(observer, weight, fmt, groups[name]) for fmt in observer.candidates]
                found[name] = current().gathered(own)[0]  # the first process's: all must choose alike
                if store:
                    store.save(found)
        return found

    def _alone(self, observer: WeightObserver, weight: Tensor, fmt: NumberFormat, group: str) -> float:
        observer.choose(fmt, weight)
        observer.paused, observer.fake_quantize = False, True
        errors = [
            METRICS[group](outputs_of(self._prepared, x), y) for x, y in zip(self._calls, self._wanted, strict=True)
        ]
        observer.paused, observer.fake_quantize = True, False
        return float(torch.stack(errors).mean())

    @torch.no_grad()
    def error(self, formats: Mapping[str, str]) -> float:
        """The relative squared error of the model's output where each named layer has its format."""
        for name, (observer, weight) in self._layers.items():
            observer.choose(next(fmt for fmt in observer.candidates if str(fmt) == formats[name]), weight)
            observer.paused, observer.fake_quantize = False, True
        found = current().gathered(total_error(self._prepared, self._calls, self._wanted))[0]
        set_fake_quantize(self._prepared, weight=False, activation=False, paused=True)
        return found


class _Store:
    """Errors of the layers that are measured so far, in one file."""

    def __init__(self, folder: str | Path, key: str):
        self._path, self._key = Path(folder) / "sensitivity.safetensors", key
        current().agreed(lambda: self._path.parent.mkdir(parents=True, exist_ok=True))

    def load(self) -> dict[str, list[float]]:
        """The errors of the layers that are done.

        Raises:
            ValueError: they are another run's, or the file is broken.
        """
        return current().agreed(self._read)

    def _read(self) -> dict[str, list[float]]:
        if not self._path.exists():
            return {}
        tensors, texts = load_state(self._path, "delete it to measure again")
        if texts.get("fingerprint") != self._key:
            raise ValueError(
                f"{self._path} belongs to another run (other formats, weights or calibration data); repeat the settings of "
                "that run, or delete it to start anew"
            )
        return {name: errors.tolist() for name, errors in tensors.items()}

    def save(self, errors: Mapping[str, list[float]]) -> None:
        """Write the errors of the layers that are done."""
        if not current().first:
            return
        tensors = {name: torch.tensor(found, dtype=torch.float64) for name, found in errors.items()}
        save_state(self._path, tensors, {"fingerprint": self._key})
