"""The schedule of a unit's steps: a warm-up without penalty, then the penalty; a plateau of the loss ends either early."""

from fp4dit_ao.config import ReconstructionConfig

GAIN = 0.01
"""Relative decrease of the mean loss, from ``patience`` steps to the next, that is no plateau."""
CLOSED = 0.01
"""Mean penalty below which gates are closed: what they have decided stays."""


class Schedule:
    """Where learning is in its ``iters`` steps.

    The loss is a mean over ``patience`` steps, error and penalty together; a mean that is not :data:`GAIN` below the last one
    is a plateau. In the warm-up it brings the penalty on. After that it ends the unit if gates are closed, or the rule has
    none; while they are open it skips as many steps as were looked at, so that the exponent falls faster: ending there would
    cut gates off half open. Everything follows from the losses, so that the same seed stops at the same step.

    Attributes:
        position: the step to take next; ``iters`` at the end.
    """

    def __init__(self, config: ReconstructionConfig):
        self.position = 0
        self._config = config
        self._warm = round(config.warmup * config.iters)
        self._last: float | None = None

    @property
    def ended(self) -> bool:
        """Whether there is no step left."""
        return self.position >= self._config.iters

    @property
    def beta(self) -> float | None:
        """Exponent of the penalty in this step; None for no penalty."""
        if self.position < self._warm or not self._config.regularizer:
            return None
        return self._config.beta_at((self.position - self._warm) / max(1, self._config.iters - self._warm))

    @property
    def progress(self) -> float:
        """Fraction of the steps before this one."""
        return self.position / self._config.iters

    def advance(self) -> int:
        """Go on to the next step; returns how many steps that is in the schedule, 1."""
        self.position += 1
        return 1

    def judge(self, loss: float, penalty: float) -> int:
        """Take means over the last ``patience`` steps; returns how many steps of the schedule are skipped.

        Args:
            loss: error and penalty, as they are minimised.
            penalty: alone, between 0 (all gates are closed) and 1.
        """
        last, self._last = self._last, loss
        if last is None or loss < last * (1 - GAIN):
            return 0
        before, iters = self.position, self._config.iters
        if before < self._warm:
            self.position, self._last = self._warm, None  # what comes is another loss
        elif penalty < CLOSED:
            self.position = iters
        else:
            self.position = min(before + (self._config.patience or 0), iters)
        return self.position - before
