"""The engine: a bounded queue, a batcher, and one thread that draws. It knows nothing of HTTP, nor of diffusers."""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp4dit_ao.serving.metrics import Metrics

Image = NDArray[np.uint8]
"""``(height, width, 3)``."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Style:
    """What images must share to be drawn together.

    Attributes:
        width: in pixels.
        height: in pixels.
        steps: of denoising.
    """

    width: int
    height: int
    steps: int


Draw = Callable[[Style, Sequence[str], Sequence[int]], Sequence[Image]]
"""(style, prompts, seeds) to one image each; called from one thread, never twice at once."""


@dataclass(frozen=True)
class Batching:
    """How images are drawn together.

    Attributes:
        max_batch: images drawn together, at most.
        window: seconds that the oldest waiting image waits for others to come, unless a batch is full.
        max_queue: images that may wait.
    """

    max_batch: int = 8
    window: float = 0.02
    max_queue: int = 64

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.max_queue < 1 or self.window < 0:
            raise ValueError(f"{self}: a batch and a queue hold at least one image, and a window is not negative")


class EngineError(RuntimeError):
    """Why an engine draws nothing now."""


class QueueFull(EngineError):
    """Too many images are waiting.

    Attributes:
        retry_after: seconds until those that wait will have been drawn, estimated.
    """

    def __init__(self, waiting: int, retry_after: float):
        super().__init__(f"{waiting} images are waiting already")
        self.retry_after = retry_after


class NotReady(EngineError):
    """The engine is warming up, has failed, or is closed."""


@dataclass(eq=False)
class _Task:
    prompt: str
    seed: int
    style: Style
    arrived: float
    deadline: float
    future: "Future[Image]"


class Engine:
    """Draws images in batches, in order of arrival, on a thread of its own.

    Args:
        draw: what draws a batch; a batch that fails is drawn again image by image, so that no image fails for its neighbours.
        warm_up: called on the engine's thread before it is ready.
        batching: how images are drawn together.
        metrics: where it is counted.

    Attributes:
        batching: as given.
        metrics: as given, or new ones.
    """

    def __init__(
        self,
        draw: Draw,
        warm_up: Callable[[], None] = lambda: None,
        batching: Batching | None = None,
        metrics: Metrics | None = None,
    ):
        self.batching = batching or Batching()
        self.metrics = metrics or Metrics()
        self._draw, self._warm_up = draw, warm_up
        self._waiting: collections.deque[_Task] = collections.deque()
        self._changed = threading.Condition()
        self._state = "new"
        self._failure: BaseException | None = None
        self._batch_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="fp4dit-engine", daemon=True)
        self.metrics.waiting.set_function(lambda: len(self._waiting))
        self.metrics.ready.set_function(lambda: float(self.ready))

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> "Engine":
        """Start the thread, which warms up first, if that was not done before; returns at once."""
        if self._state == "new":
            self._state = "warming up"
            self._thread.start()
        return self

    @property
    def state(self) -> str:
        """``"new"``, ``"warming up"``, ``"ready"``, ``"failed"`` or ``"closed"``."""
        return self._state

    @property
    def ready(self) -> bool:
        return self._state == "ready"

    @property
    def failure(self) -> BaseException | None:
        """What went wrong while warming up."""
        return self._failure

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Block while the engine warms up.

        Raises:
            NotReady: it failed, was closed, or took longer than ``timeout`` seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state not in ("new", "warming up"), timeout)
        if not self.ready:
            raise NotReady(self._reason())

    def close(self) -> None:
        """Refuse what comes and what waits; return when what runs is finished."""
        with self._changed:
            started, self._state = self._state != "new", "closed"
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for task in abandoned:
            _settle(task.future, NotReady("the server is shutting down"))
        if started:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- work --------------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: str, seeds: Sequence[int], style: Style, timeout: float = float("inf")
    ) -> "list[Future[Image]]":
        """Ask for one image per seed; all of them are accepted, or none. A future that is cancelled in time is not drawn.

        Args:
            prompt: of all of them.
            seeds: of each one's noise.
            style: size and steps.
            timeout: seconds until an image that still waits is given up, with ``TimeoutError``.

        Raises:
            NotReady: the engine is not ready.
            QueueFull: they would not all fit.
        """
        now = time.monotonic()
        tasks = [_Task(prompt, seed, style, now, now + timeout, Future()) for seed in seeds]
        with self._changed:
            if not self.ready:
                raise NotReady(self._reason())
            if any(task.future.cancelled() for task in self._waiting):
                self._waiting = collections.deque(task for task in self._waiting if not task.future.cancelled())
            waiting = len(self._waiting)
            if waiting + len(tasks) > self.batching.max_queue:
                raise QueueFull(waiting, self._batch_seconds * (1 + waiting / self.batching.max_batch))
            self._waiting.extend(tasks)
            self._changed.notify_all()
        return [task.future for task in tasks]

    def _reason(self) -> str:
        if self._state == "failed":
            return f"the model failed to warm up: {self._failure}"
        return {"closed": "the server is shutting down"}.get(self._state, "the model is warming up")

    def _work(self) -> None:
        began = time.monotonic()
        try:
            self._warm_up()
        except BaseException as error:
            log.exception("warming up failed")
            self._become("failed", error)
            return
        self._become("ready")
        log.info("ready after %.1f s of warm-up", time.monotonic() - began)
        while batch := self._next_batch():
            self._run(batch)

    def _become(self, state: str, failure: BaseException | None = None) -> None:
        with self._changed:
            if self._state != "closed":
                self._state, self._failure = state, failure
            self._changed.notify_all()

    def _next_batch(self) -> list[_Task]:
        """What is drawn next: the oldest image, and those of its style behind it. Empty once the engine is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._state == "closed")
                if self._state == "closed":
                    return []
                oldest = self._waiting[0]
                batch = [task for task in self._waiting if task.style == oldest.style][: self.batching.max_batch]
                patience = oldest.arrived + self.batching.window - time.monotonic()
                if len(batch) < self.batching.max_batch and patience > 0:
                    self._changed.wait(patience)
                    continue
                chosen = set(map(id, batch))
                self._waiting = collections.deque(task for task in self._waiting if id(task) not in chosen)
                batch = [task for task in batch if self._begin(task)]
                if batch:
                    return batch

    @staticmethod
    def _begin(task: _Task) -> bool:
        """Whether ``task`` is still wanted; from here on it cannot be cancelled."""
        if not task.future.set_running_or_notify_cancel():
            return False
        if time.monotonic() > task.deadline:
            _settle(task.future, TimeoutError("it waited too long"))
            return False
        return True

    def _run(self, batch: list[_Task]) -> None:
        """Draws a batch taken from the queue; if that fails, its images one by one."""
        began = time.monotonic()
        for task in batch:
            self.metrics.waited.observe(began - task.arrived)
        try:
            self._draw_together(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            log.warning("a batch of %d failed and is drawn one by one: %s", len(batch), error)
            for task in batch:
                try:
                    self._draw_together([task])
                except Exception as own_error:
                    self._fail(task, own_error)

    def _draw_together(self, batch: list[_Task]) -> None:
        """Draws the images of ``batch`` in one call and hands them out; raises what the drawing raises."""
        began = time.monotonic()
        self.metrics.batch_size.observe(len(batch))
        images = self._draw(batch[0].style, [task.prompt for task in batch], [task.seed for task in batch])
        if len(images) != len(batch):
            raise RuntimeError(f"{len(images)} images were drawn for {len(batch)} prompts")
        took = time.monotonic() - began
        self._batch_seconds += 0.3 * (took - self._batch_seconds)
        self.metrics.batch_seconds.observe(took)
        self.metrics.images.inc(len(batch))
        for task, image in zip(batch, images, strict=True):
            _settle(task.future, image)

    @staticmethod
    def _fail(task: _Task, error: Exception) -> None:
        log.error("drawing failed", exc_info=error)
        _settle(task.future, error)


def _settle(future: "Future[Any]", outcome: Any) -> None:
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:  # cancelled meanwhile: nobody waits for it
        pass
