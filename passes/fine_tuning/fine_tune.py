"""The plug-in point *fine-tuning*: fitting what quantization left continuous, with the float graph as teacher."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.fx import GraphModule

from fp4dit_ao.util.registry import Registry


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings of :func:`fp4dit_ao.passes.fine_tuning.run_fine_tuning`.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 200
    """Optimisation steps."""
    batch_size: int = 4
    """Samples per step; their gradients are summed one sample at a time."""
    lr: float = 1e-3
    """Adam's learning rate at the first step; it falls to zero along half a cosine. Its unit is the method's own."""
    seed: int = 0
    """Seed of the choice of samples."""
    save_every: int = 50
    """Steps between two saved states, where a checkpoint folder is given."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"FineTuneConfig: {name}={getattr(self, name)}; it must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"FineTuneConfig: lr={self.lr}; it must be more than 0")


@dataclass(frozen=True)
class FineTuneReport:
    """What fine-tuning did.

    Attributes:
        loss_before: squared error of the student's outputs over all samples, relative to the power of the teacher's.
        loss_after: the same at the end; equal to ``loss_before`` where nothing was kept.
        kept: whether the tuned student is better on all samples, and was kept.
        parameters: number of trained values.
        seconds: duration.
    """

    loss_before: float
    loss_after: float
    kept: bool
    parameters: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """Fields by name, for JSON."""
        return dataclasses.asdict(self)


class FineTune(Protocol):
    """Trains a prepared graph against the float graph that it was made from.

    The prepared graph is both: its observers paused, it is the teacher; its observers set to fake quantization, it is the
    student. A method changes observers (scales, codes) in place, so that ``convert_pt2e`` afterwards stores what was learned,
    and leaves them observing. At its end it may give the graph other parameters than weights (biases); it never writes into
    one, since the captured model shares them. It must keep the student that it was given if the error over all samples is not
    less than before.
    """

    def __call__(
        self,
        prepared: GraphModule,
        samples: Sequence[Mapping[str, object]],
        config: FineTuneConfig,
        *,
        checkpoint_dir: str | Path | None = None,
        progress: bool = True,
    ) -> FineTuneReport:
        """Trains in place.

        Args:
            prepared: from ``prepare_pt2e``, calibrated; a learned rounding, if any, is kept.
            samples: keyword arguments of forward calls, taken from denoising trajectories.
            config: how long and how fast.
            checkpoint_dir: folder of saved states; the same call after a kill resumes there, and ends with the same bits.
            progress: show a progress bar with the time left.

        Raises:
            ValueError: no samples, nothing to train, or a checkpoint of another run.
        """
        ...


FINE_TUNINGS: Registry[FineTune] = Registry("fine-tuning")
"""Methods of fine-tuning by name."""
