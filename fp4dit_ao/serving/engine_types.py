"""Types that an engine and its callers share: images, styles, batching, and the errors of a busy engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""One image, ``(height, width, 3)``."""


@dataclass(frozen=True)
class Style:
    """Properties that images must share to be drawn together.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        steps: denoising steps.
    """

    width: int
    height: int
    steps: int


Draw = Callable[[Style, Sequence[str], Sequence[int]], Sequence[Image]]
"""Draws one image per prompt from (style, prompts, seeds); called from one thread."""


@dataclass(frozen=True)
class Batching:
    """Sizes and waiting times of batches.

    Attributes:
        max_batch: most images drawn together.
        window: seconds that the oldest image waits for others before a batch that is not full is drawn.
        max_queue: most waiting images.

    Raises:
        ValueError: a size is below 1, or the window is negative.
    """

    max_batch: int = 8
    window: float = 0.02
    max_queue: int = 64

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1 or self.window < 0:
            raise ValueError(f"{self}: a batch and a queue hold at least one image, and a window is not negative")


class EngineError(RuntimeError):
    """Base class of the errors of an engine that accepts no images now."""


class QueueFull(EngineError):
    """Too many images are waiting.

    Attributes:
        retry_after: estimated seconds until the waiting images are drawn.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} images are waiting already")
        self.retry_after = retry_after


class Abandoned(EngineError):
    """Nobody waits for the images of the running batch any more; see ``Engine.check``."""


class NotReady(EngineError):
    """The engine is warming up, has failed, or is closed."""
