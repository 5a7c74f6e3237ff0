"""How rounding is learned: :class:`AdaRoundConfig`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdaRoundConfig:
    """How the rounding is learned. The defaults are FP4DiT's (arXiv 2503.15465), in portable units.

    Raises:
        ValueError: a value out of range.
    """

    iters: int = 2500
    """Optimisation steps a block; 0 keeps round-to-nearest."""
    batch_size: int = 16
    """Calibration rows (a sample of guidance batch 2 is two rows) in one step."""
    lr: float | None = None
    """Adam's learning rate, absolute: in weight units if scale-aware (the paper: 1e-4), else logits. None: ``relative_lr``."""
    relative_lr: float | None = None
    """Logits that the median weight's gate moves in a step. The paper's 1e-4 lies between 3e-3 and 1e-2 where group maxima
    are near 0.1. None: 5e-3, or ``4 / iters`` if that is more, so that a short run can still cross from gate to gate."""
    scale_aware: bool = True
    """Scale-aware AdaRound (the paper's), else plain AdaRound."""
    regularizer: float = 1.0
    """Weight of the mean of ``1 - |2h - 1|^beta`` beside a reconstruction error that starts at 1. The paper's 0.01 multiplies
    the *sum* over the block's n weights, beside an error summed over dimension 1 (a DiT's tokens, T of them) and averaged over
    the rest (D channels): equal to ``0.01 n / (T e)`` here, with e the mean squared error of round-to-nearest. There it
    dwarfs the error once beta is small; here error and regulariser start alike, whatever the model's scale."""
    beta: tuple[float, float] = (20.0, 2.0)
    """First and last exponent of the regulariser; linear in between."""
    warmup: float = 0.2
    """Fraction of the steps without regulariser."""
    seed: int = 0
    """Of the minibatches; each block has its own generator, so a resumed run continues with the same bits."""
    compile: bool = False
    """Run each block through ``torch.compile``: worth its start where there are many iterations."""
    offload: bool | None = None
    """Keep the streams' values in host memory, and only a minibatch on the model's device. None: if they would fill half of
    what the accelerator has free."""
    memory_limit_bytes: int | None = None
    """Ceiling for the streams' values; exceeding it is an error, at the start, that says how many rows would fit."""

    def __post_init__(self) -> None:
        for name, low in (("iters", 0), ("batch_size", 1), ("regularizer", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"AdaRoundConfig: {name}={getattr(self, name)}; it must be at least {low}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"AdaRoundConfig: warmup={self.warmup}; it must be at least 0 and less than 1")

        for name in ("lr", "relative_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"AdaRoundConfig: {name}={value}; it must be more than 0, or None for the default")

    def beta_at(self, progress: float) -> float:
        """The regulariser's exponent after a fraction ``progress`` of the steps that have one."""
        first, last = self.beta
        return first + (last - first) * progress

    @property
    def rule(self) -> str:
        """Name of the rounding rule in ``rounding.RULES``."""
        return "scale_aware" if self.scale_aware else "adaround"

    @property
    def step_in_logits(self) -> float:
        """``relative_lr``, or its default."""
        return self.relative_lr if self.relative_lr is not None else max(5e-3, 4 / max(1, self.iters))
