"""Types that an engine and its callers share: images, styles, edits, previews, batching, the errors of a busy engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""One image, ``(height, width, 3)``."""


@dataclass(frozen=True, eq=False)
class Edit:
    """An image to start from, in place of noise; images of one request share it and are drawn together.

    Attributes:
        image: the image, of the size that is drawn.
        mask: bool ``(height, width)``, True where the image is drawn anew; None for all of it.
        strength: how far the image is taken back to noise, 0 to 1; that part of the steps is run.
    """

    image: Image
    mask: NDArray[np.bool_] | None
    strength: float


@dataclass(frozen=True)
class Style:
    """Properties that images must share to be drawn together.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        steps: denoising steps.
        edit: the image to start from; None for noise.
    """

    width: int
    height: int
    steps: int
    edit: Edit | None = None


@dataclass(frozen=True)
class Preview:
    """Wish to see an image while it is drawn.

    Attributes:
        count: how many times, evenly spread over the steps; fewer if there are not as many steps.
        show: called on the engine's thread with the number of the preview, from 0, and what the image looks like.
    """

    count: int
    show: Callable[[int, Image], None]

    def number_after(self, done: int, steps: int) -> int | None:
        """The number of the preview that is due after ``done`` of ``steps`` steps; None if none is."""
        due = [steps * (number + 1) // (self.count + 1) for number in range(self.count)]
        return due.index(done) if done in due else None


Look = Callable[[Sequence[int]], Sequence[Image]]
"""What some images of the running batch look like now, by their places in it."""


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
