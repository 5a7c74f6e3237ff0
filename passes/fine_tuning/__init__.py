"""Fine-tuning: scales, biases and weights fitted to the float model's outputs once they are rounded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.fx import GraphModule

from fp4dit_ao.passes.fine_tuning import (  # noqa: F401, they register themselves
    bias_correction,
    binarydm,
    efficientdm,
    full_weights,
    quest,
    qvgen,
    scale_tuning,
)
from fp4dit_ao.passes.fine_tuning.fine_tune import FINE_TUNINGS, FineTune, FineTuneConfig, FineTuneReport

__all__ = ["FINE_TUNINGS", "FineTune", "FineTuneConfig", "FineTuneReport", "run_fine_tuning"]


def run_fine_tuning(
    prepared: GraphModule,
    samples: Sequence[Mapping[str, object]],
    method: str = "scales",
    config: FineTuneConfig | None = None,
    *,
    checkpoint_dir: str | Path | None = None,
    progress: bool = True,
) -> FineTuneReport:
    """Fine-tunes a prepared graph by the method of that name; see :class:`FineTune` for the arguments.

    Raises:
        ValueError: an unknown method, or what the method refuses.
    """
    tune = FINE_TUNINGS.find(method)
    return tune(prepared, samples, config or FineTuneConfig(), checkpoint_dir=checkpoint_dir, progress=progress)
