"""The plug-in point *fine-tuning*: fitting what quantization left continuous, with the float graph as teacher."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.fx import GraphModule

from fp4dit_ao.util.registry import Registry

OPTIMIZERS = ("adam", "q_galore")
"""Optimizers of whole weights."""


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
    lr: float | None = None
    """Learning rate at the first step; it falls to zero along half a cosine. Its unit is the method's own; None takes the
    method's own rate, too."""
    seed: int = 0
    """Seed of all that is drawn at random: the choice of samples, the start of adapters, stochastic rounding."""
    held_out: float = 0.1
    """Share of the samples, the last ones, that are not trained on and by which is judged whether the result is kept. Samples
    of a pipeline come prompt by prompt, so these are other prompts. Where it is less than one sample, all are trained on and
    all judge."""
    rank: int | None = None
    """Rank of adapters, of branches that fade out, and of Q-GaLore's projections; None takes the method's own."""
    optimizer: str | None = None
    """Optimizer of whole weights: ``"adam"``, or ``"q_galore"``, which takes some 2 bytes a weight in place of 12; None
    takes the method's own."""
    share: float = 0.07
    """Share of the weights that ``"quest"`` trains, besides those that see the timestep alone."""
    checkpoint_activations: bool = True
    """Keep of each block its input alone, and compute the block a second time for its gradient: the same bits, in less
    memory and more time."""
    save_every: int = 50
    """Steps between two saved states, where a checkpoint folder is given."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "rank"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"FineTuneConfig: {name}={value}; it must be at least 1")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"FineTuneConfig: lr={self.lr}; it must be more than 0")
        for name in ("held_out", "share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"FineTuneConfig: {name}={getattr(self, name)}; it must be at least 0 and less than 1")
        if self.optimizer not in (None, *OPTIMIZERS):
            raise ValueError(f"FineTuneConfig: optimizer={self.optimizer!r}; choose one of {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class FineTuneReport:
    """What fine-tuning did.

    Attributes:
        loss_before: squared error of the student's outputs, relative to the power of the teacher's, over the samples that
            judge: those held out, or all.
        loss_after: the same at the end; equal to ``loss_before`` where nothing was kept.
        kept: whether the tuned student is better on these samples, and was kept.
        parameters: number of trained values.
        seconds: duration.
        held_out: number of samples that were not trained on; 0 where all samples judge.
        state_bytes: bytes of what training keeps from step to step: trained values and the optimizer's state.
    """

    loss_before: float
    loss_after: float
    kept: bool
    parameters: int
    seconds: float
    held_out: int = 0
    state_bytes: int = 0

    def sentence(self) -> str:
        """What a user is told."""
        judges = f"{self.held_out} held-out samples" if self.held_out else "all samples"
        change = (
            f"{self.loss_before:.3g} → {self.loss_after:.3g}" if self.kept else f"{self.loss_before:.3g}, not lowered"
        )
        return f"fine-tuning: relative error of the output on {judges}: {change}, after {self.seconds:.0f} s"

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
