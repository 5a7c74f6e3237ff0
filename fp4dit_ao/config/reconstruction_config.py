"""How weights are rounded: :class:`ReconstructionConfig`, and :class:`AdaRoundConfig` for the paper's way."""

import math
from dataclasses import KW_ONLY, dataclass, field


@dataclass(frozen=True)
class ReconstructionConfig:
    """Settings of :func:`fp4dit_ao.reconstruct`: three methods by name, and how learned rounding is optimised.

    The defaults are FP4DiT's (arXiv 2503.15465), in portable units. Names are looked up in the registries of
    ``fp4dit_ao.passes.reconstruction`` when the config is used, so a method of your own works once it is registered.

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    rounding: str = "scale_aware"
    """Rounding rule, a name in ``rounding.ROUNDINGS``: learned (such as ``"scale_aware"``, ``"adaround"``) or in closed form
    (``"gptq"``, ``"gptq_act_order"``, ``"nearest"``). Fields of the optimisation concern learned rules alone."""
    objective: str = "mse"
    """Loss to minimise, which also decides whether a rounding is kept: a name in ``objectives.OBJECTIVES``."""
    scope: str = "block"
    """Part that is rounded together: ``"block"``, ``"layer"``, ``"window"`` or another name in ``scopes.SCOPES``."""
    iters: int = 2500
    """Optimisation steps per unit (block, layer or window); 0 keeps round-to-nearest."""
    batch_size: int = 16
    """Calibration rows (a sample of guidance batch 2 is two rows) per step, and per forward pass of any other kind."""
    lr: float | None = None
    """The optimizer's learning rate, absolute: in weight units for scale-aware AdaRound (the paper: 1e-4), in logits for plain
    AdaRound, in steps of the format for ``"sign_gradient"``. None: ``relative_lr``. Excludes ``relative_lr``."""
    relative_lr: float | None = None
    """Logits that the median weight's gate moves per step. The paper's 1e-4 lies between 3e-3 and 1e-2 where group maxima
    are near 0.1. None: 5e-3, or ``4 / iters`` if that is more, so that a short run can still cross from gate to gate."""
    _: KW_ONLY
    regularizer: float = 1.0
    """Weight of the mean of ``1 - |2h - 1|^beta`` beside a reconstruction error that starts at 1. The paper's 0.01 multiplies
    the *sum* over the block's n weights, beside an error summed over dimension 1 (a DiT's tokens, T of them) and averaged over
    the rest (D channels): equal to ``0.01 n / (T e)`` here, with e the mean squared error of round-to-nearest. There it
    dwarfs the error once beta is small; here error and regulariser start alike, whatever the model's scale."""
    beta: tuple[float, float] = (20.0, 2.0)
    """First and last exponent of the regulariser; linear in between. Both more than 1: up to there the penalty has a corner at
    a half-open gate, and no gradient."""
    warmup: float = 0.2
    """Fraction of the steps without regulariser."""
    window: int = 2
    """Consecutive blocks that scope ``"window"`` rounds together."""
    overlap: int = 1
    """Blocks that two successive windows share: their rounding is refined once more."""
    seed: int = 0
    """Seed of the minibatches; each unit has its own generator, so a resumed run continues with the same bits."""
    patience: int | None = None
    """Steps over which losses are averaged to find a plateau, where the mean is not 1 % below that of as many steps before. In
    the warm-up it brings the regulariser on; later it skips as many steps, or ends the unit once gates are closed. None: every
    unit takes ``iters`` steps."""
    bfloat16: bool | None = None
    """Multiply in bfloat16 while a rounding is learned: linears and attention, forward and backward. Learned variables,
    the optimizer's state, norms and the residual stream are float32 in any case, and so is what judges a rounding. None: on
    GPUs that have it."""
    shards: int | None = None
    """Parts of the calibration data whose gradients are added up, by pairs. None: as many as there are processes. Any number of
    processes gives the same bits, if it divides ``shards`` by 1, 2, 4, …"""
    compile: bool = False
    """Learn under ``torch.compile``: the first unit of each structure waits for the compiler, half a minute or so, and steps
    take about two thirds of the time. Worth it from hundreds of steps in all at PixArt-XL's width, thousands at a fifth."""
    offload: bool | None = None
    """Keep the streams' values in host memory, and only a minibatch on the model's device. None: if they would fill half of
    what the accelerator has free."""
    memory_limit_bytes: int | None = None
    """Ceiling for the streams' values; exceeding it is an error, at the start, that says how many rows would fit."""

    def __post_init__(self) -> None:
        for name in ("rounding", "objective", "scope"):
            if not isinstance(getattr(self, name), str):
                raise self._error(name, "it must be the name of a registered method")
        for name, low in (("iters", 0), ("batch_size", 1), ("window", 1), ("overlap", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise self._error(name, f"it must be a whole number of at least {low}")
        for name, default in (("patience", "all steps"), ("shards", "the number of processes")):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise self._error(name, f"it must be a whole number of at least 1, or None for {default}")
        if not 0 <= self.regularizer < math.inf:
            raise self._error("regularizer", "it must be at least 0, and finite")
        if not 0 <= self.warmup < 1:
            raise self._error("warmup", "it must be at least 0 and less than 1")
        if self.overlap >= self.window:
            raise self._error("overlap", f"it must be less than window={self.window}, or windows would not advance")
        object.__setattr__(self, "beta", self._checked_beta())
        for name in ("lr", "relative_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise self._error(name, "it must be more than 0, or None for the default")
        if self.lr is not None and self.relative_lr is not None:
            raise self._error("lr", f"relative_lr={self.relative_lr} says the same in other units; give one of the two")

    def _checked_beta(self) -> tuple[float, float]:
        beta = tuple(self.beta) if isinstance(self.beta, tuple | list) else ()
        numbers = [x for x in beta if isinstance(x, int | float) and not isinstance(x, bool) and 1 < x < math.inf]
        if len(beta) != 2 or len(numbers) != 2:
            raise self._error("beta", "it must be two numbers, the first and the last exponent, each more than 1")
        return (numbers[0], numbers[1])

    def _error(self, name: str, expected: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r}; {expected}")

    def beta_at(self, progress: float) -> float:
        """The regulariser's exponent after a fraction ``progress`` of the steps that have one."""
        first, last = self.beta
        return first + (last - first) * progress

    @property
    def step_in_logits(self) -> float:
        """``relative_lr``, or its default."""
        return self.relative_lr if self.relative_lr is not None else max(5e-3, 4 / max(1, self.iters))


@dataclass(frozen=True)
class AdaRoundConfig(ReconstructionConfig):
    """Learned rounding as FP4DiT has it: scale-aware AdaRound, block by block, on the mean squared error.

    A :class:`ReconstructionConfig` whose three methods are fixed. Fields after ``relative_lr`` are given by name.
    """

    rounding: str = field(init=False, default="scale_aware")
    """``"scale_aware"``, or ``"adaround"`` where ``scale_aware`` is False."""
    objective: str = field(init=False, default="mse")
    scope: str = field(init=False, default="block")
    window: int = field(init=False, default=2)
    overlap: int = field(init=False, default=1)
    scale_aware: bool = field(default=True, kw_only=True)
    """Scale-aware AdaRound (the paper's), else plain AdaRound."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounding", "scale_aware" if self.scale_aware else "adaround")
        super().__post_init__()
