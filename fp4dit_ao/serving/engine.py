"""Engine of a server: a bounded queue, a batcher, and one thread that draws. It depends neither on HTTP nor on diffusers."""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from fp4dit_ao.serving.engine_types import Abandoned, Batching, Draw, Image, Look, NotReady, Preview, QueueFull, Style
from fp4dit_ao.serving.metrics import Metrics

log = logging.getLogger(__name__)


class _Wanted(Future[Image]):
    """Future that remembers that it was cancelled, also while its image is drawn."""

    abandoned = False

    def cancel(self) -> bool:
        self.abandoned = True
        return super().cancel()


@dataclass(eq=False)
class _Task:
    prompt: str
    seed: int
    style: Style
    arrived: float
    deadline: float
    future: _Wanted
    preview: Preview | None
    shown: int = 0


class Engine:
    """Draws images in batches, in order of arrival, on its own thread.

    Args:
        draw: draws a batch; if that takes long, it calls :meth:`check` now and then. A batch that fails is drawn again image
            by image, so that one bad image does not fail the others.
        warm_up: called on the engine's thread before the engine is ready.
        batching: sizes and waiting times of batches.
        metrics: counters to update; new ones if None.

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
        self._running: list[_Task] = []
        self._stopping = False
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
        """Starts the thread, which warms up first; returns at once. Later calls do nothing."""
        if self._state == "new":
            self._state = "warming up"
            self._thread.start()
        return self

    @property
    def state(self) -> str:
        """State: ``"new"``, ``"warming up"``, ``"ready"``, ``"failed"`` or ``"closed"``."""
        return self._state

    @property
    def ready(self) -> bool:
        """Whether images are accepted."""
        return self._state == "ready"

    @property
    def failure(self) -> BaseException | None:
        """Exception of a failed warm-up, else None."""
        return self._failure

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Blocks while the engine warms up.

        Raises:
            NotReady: the warm-up failed or took longer than ``timeout`` seconds, or the engine was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state not in ("new", "warming up"), timeout)
        if not self.ready:
            raise NotReady(self._reason())

    def close(self, timeout: float | None = None) -> None:
        """Refuses new and waiting images; returns when the running batch is finished.

        Args:
            timeout: seconds after which the running batch (or the warm-up) ends at its next :meth:`check`, or is left to its
                thread if it does not check within as many seconds again; None waits for as long as it takes.
        """
        with self._changed:
            started, self._state = self._state != "new", "closed"
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for task in abandoned:
            _settle(task.future, NotReady("the server is shutting down"))
        if not started:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._stopping = True
            self._thread.join(timeout)
        if self._thread.is_alive():
            log.warning("the batch that is running did not end within %g s and is left behind", 2 * (timeout or 0))

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- work --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str,
        seeds: Sequence[int],
        style: Style,
        timeout: float = float("inf"),
        preview: Preview | None = None,
    ) -> "list[Future[Image]]":
        """Queues one image per seed; either all are accepted or none. Images whose future is cancelled in time are not
        drawn, and a batch ends early once all of its futures were cancelled or are out of time.

        Args:
            prompt: prompt of all images.
            seeds: seed of each image's noise.
            style: size and steps.
            timeout: seconds after which an image fails with ``TimeoutError``.
            preview: wish to see each of them while it is drawn; see :meth:`check`.

        Raises:
            NotReady: the engine is not ready.
            QueueFull: the queue cannot hold all of them.
        """
        now = time.monotonic()
        tasks = [_Task(prompt, seed, style, now, now + timeout, _Wanted(), preview) for seed in seeds]
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

    def check(self, done: int = 0, look: Look | None = None) -> None:
        """Called by ``draw`` and ``warm_up`` between steps.

        Args:
            done: number of finished steps.
            look: shows the images of the running batch; without it there are no previews.

        Raises:
            Abandoned: nobody waits for the running batch any more, or the engine was closed and cannot wait for it.
        """
        now = time.monotonic()
        if self._stopping or (self._running and all(t.future.abandoned or now > t.deadline for t in self._running)):
            raise Abandoned("nobody waits for these images any more")
        if look is not None:
            self._show(done, look)

    def _show(self, done: int, look: Look) -> None:
        """Hands out the previews that are due; one that was shown before the batch failed is not shown again."""
        due: dict[int, int] = {}
        for place, task in enumerate(self._running):
            number = None if task.preview is None else task.preview.number_after(done, task.style.steps)
            if number is not None and number >= task.shown and not task.future.abandoned:
                due[place] = number
        for (place, number), image in zip(due.items(), look([*due]) if due else (), strict=True):
            task = self._running[place]
            assert task.preview is not None
            task.shown = number + 1
            task.preview.show(number, image)

    def _reason(self) -> str:
        if self._state == "failed":
            return f"the model failed to warm up: {self._failure}"
        return {"closed": "the server is shutting down"}.get(self._state, "the model is warming up")

    def _work(self) -> None:
        began = time.monotonic()
        try:
            self._warm_up()
        except Abandoned:
            return
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
        """Takes the next batch from the queue: the oldest image and later ones of its style. Empty once the engine is
        closed."""
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
        """Marks ``task`` as running, so that it cannot be cancelled any more; returns whether it is still wanted."""
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
        except Abandoned:
            self._give_up(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch[0], error)
                return
            log.warning("a batch of %d failed and is drawn one by one: %s", len(batch), error)
            for task in batch:
                try:
                    self._draw_together([task])
                except Abandoned:
                    self._give_up([task])
                except Exception as own_error:
                    self._fail(task, own_error)

    def _draw_together(self, batch: list[_Task]) -> None:
        """Draws the images of ``batch`` in one call and hands them out; raises what the drawing raises."""
        began = time.monotonic()
        self.metrics.batch_size.observe(len(batch))
        self._running = batch
        try:
            images = self._draw(batch[0].style, [task.prompt for task in batch], [task.seed for task in batch])
        finally:
            self._running = []
        if len(images) != len(batch):
            raise RuntimeError(f"{len(images)} images were drawn for {len(batch)} prompts")
        took = time.monotonic() - began
        self._batch_seconds += 0.3 * (took - self._batch_seconds)
        self.metrics.batch_seconds.observe(took)
        self.metrics.images.inc(len(batch))
        for task, image in zip(batch, images, strict=True):
            _settle(task.future, image)

    @staticmethod
    def _give_up(batch: list[_Task]) -> None:
        log.info("a batch of %d ended early: nobody waited for it", len(batch))
        for task in batch:
            _settle(task.future, TimeoutError("nobody waited for it"))

    @staticmethod
    def _fail(task: _Task, error: Exception) -> None:
        log.error("drawing failed", exc_info=error)
        _settle(task.future, error)


def _settle(future: "Future[Image]", outcome: Image | BaseException) -> None:
    """Sets the result or the exception of a future, unless it was cancelled."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:  # cancelled meanwhile
        pass
