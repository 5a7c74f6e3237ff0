"""The engine, drawing with functions whose speed and failures the tests decide; then with a real quantized pipeline."""

import copy
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4dit_ao.serving.drawing import Painter
from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Abandoned, Batching, Image, Look, NotReady, Preview, QueueFull, Style

SMALL, LARGE = Style(8, 8, 1), Style(16, 8, 1)


def picture(style: Style, prompt: str, seed: int) -> Image:
    """What a prompt looks like: told apart by size, prompt and seed."""
    return np.full((style.height, style.width, 3), (len(prompt) * 7 + seed) % 256, np.uint8)


class Gate:
    """Draws only while open, and remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[Style, list[str], list[int]]] = []
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self, style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        self.entered.set()
        assert self.open.wait(30)
        self.batches.append((style, list(prompts), list(seeds)))
        return [picture(style, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


@pytest.fixture
def gate() -> Gate:
    return Gate()


def ready(draw: Callable, **batching: float) -> Engine:
    engine = Engine(draw, batching=Batching(**({"window": 0.0} | batching))).start()
    engine.wait_until_ready(30)
    return engine


def value(engine: Engine, name: str, **labels: str) -> float:
    found = engine.metrics.registry.get_sample_value(name, labels)
    assert found is not None
    return found


# --- batches ---------------------------------------------------------------------------------------------------------


def test_what_waits_together_is_drawn_together_by_style_and_in_order(gate: Gate) -> None:
    with ready(gate, max_batch=3) as engine:
        running = engine.submit("first", [0], SMALL)
        assert gate.entered.wait(30)
        futures = [
            engine.submit(prompt, [seed], style)[0]
            for seed, (prompt, style) in enumerate(
                [("a", SMALL), ("b", LARGE), ("c", SMALL), ("d", SMALL), ("e", SMALL), ("f", LARGE)]
            )
        ]
        assert value(engine, "fp4dit_queue_depth") == 6
        gate.open.set()
        images = [future.result(30) for future in running + futures]
    assert gate.batches == [
        (SMALL, ["first"], [0]), (SMALL, ["a", "c", "d"], [0, 2, 3]), (LARGE, ["b", "f"], [1, 5]), (SMALL, ["e"], [4]),
    ]  # fmt: skip
    assert [image.shape for image in images] == [(8, w, 3) for w in (8, 8, 16, 8, 8, 8, 16)]
    assert value(engine, "fp4dit_images_total") == 7
    assert value(engine, "fp4dit_batch_size_sum") == 7
    assert value(engine, "fp4dit_batch_size_count") == 4
    assert value(engine, "fp4dit_queue_depth") == 0


def test_the_oldest_image_waits_for_others_but_a_full_batch_does_not(gate: Gate) -> None:
    gate.open.set()
    with ready(gate, max_batch=2, window=0.5) as engine:
        began = time.monotonic()
        first = engine.submit("a", [0], SMALL)
        first[0].result(30)
        assert time.monotonic() - began >= 0.5
        began = time.monotonic()
        for future in engine.submit("b", [0, 1], SMALL):
            future.result(30)
        assert time.monotonic() - began < 0.5
    assert [prompts for _, prompts, _ in gate.batches] == [["a"], ["b", "b"]]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.text("xy", max_size=3), st.integers(1, 4), st.sampled_from([SMALL, LARGE])), max_size=12),
    st.integers(1, 5),
)
def test_everyone_gets_the_images_they_asked_for(wanted: list[tuple[str, int, Style]], max_batch: int) -> None:
    sizes = []

    def draw(style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        sizes.append(len(prompts))
        return [picture(style, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    with ready(draw, max_batch=max_batch) as engine:
        asked = [(p, n, style, engine.submit(p, range(n), style)) for p, n, style in wanted]
        for prompt, n, style, futures in asked:
            for seed in range(n):
                np.testing.assert_array_equal(futures[seed].result(30), picture(style, prompt, seed))
    assert sum(sizes) == sum(n for _, n, _ in wanted)
    assert all(1 <= size <= max_batch for size in sizes)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_whole_requests_and_says_when_to_come_again(gate: Gate) -> None:
    with ready(gate, max_batch=1, max_queue=3) as engine:
        running = engine.submit("running", [0], SMALL)
        assert gate.entered.wait(30)
        kept = engine.submit("kept", [0, 1], SMALL)
        with pytest.raises(QueueFull, match="2 images are waiting already") as refused:
            engine.submit("too many", [0, 1], SMALL)
        assert refused.value.retry_after > 0
        kept[0].cancel()  # what nobody waits for takes no place
        more = engine.submit("fits now", [0, 1], SMALL)
        gate.open.set()
        for future in [*running, kept[1], *more]:
            future.result(30)
        with pytest.raises(CancelledError):
            kept[0].result(1)
    assert ["kept"] in [prompts for _, prompts, _ in gate.batches]
    assert sum(prompts == ["kept"] for _, prompts, _ in gate.batches) == 1


def test_an_image_that_waited_too_long_is_not_drawn(gate: Gate) -> None:
    with ready(gate) as engine:
        running = engine.submit("running", [0], SMALL)
        assert gate.entered.wait(30)
        late = engine.submit("late", [0], SMALL, timeout=0.01)
        time.sleep(0.05)
        gate.open.set()
        running[0].result(30)
        with pytest.raises(TimeoutError):
            late[0].result(30)
    assert [prompts for _, prompts, _ in gate.batches] == [["running"]]


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}, {"window": -1}])
def test_impossible_batching_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        Batching(**wrong)


# --- failures --------------------------------------------------------------------------------------------------------


def test_an_image_that_fails_does_not_take_its_neighbours_along(gate: Gate) -> None:
    def draw(style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        if "bad" in prompts:
            raise RuntimeError("no such thing")
        return gate(style, prompts, seeds)

    gate.open.set()
    with ready(draw, window=0.2) as engine:
        good, bad, other = (engine.submit(prompt, [0], SMALL)[0] for prompt in ("good", "bad", "other"))
        assert good.result(30).shape == other.result(30).shape == (8, 8, 3)
        with pytest.raises(RuntimeError, match="no such thing"):
            bad.result(30)
        assert engine.ready


def test_an_image_of_a_failed_batch_waited_once(gate: Gate) -> None:
    def draw(style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        if len(prompts) > 1:
            raise RuntimeError("one at a time, please")
        return gate(style, prompts, seeds)

    gate.open.set()
    with ready(draw, max_batch=3, window=30) as engine:
        for future in engine.submit("a", [0, 1, 2], SMALL):
            future.result(30)
    assert [seeds for _, _, seeds in gate.batches] == [[0], [1], [2]]
    assert value(engine, "fp4dit_queue_seconds_count") == 3
    assert value(engine, "fp4dit_images_total") == 3


def test_images_that_go_missing_are_an_error() -> None:
    with ready(lambda *_: []) as engine, pytest.raises(RuntimeError, match="0 images were drawn for 1 prompts"):
        engine.submit("a", [0], SMALL)[0].result(30)


def test_nothing_is_drawn_before_the_warm_up_is_over(gate: Gate) -> None:
    warm = threading.Event()
    engine = Engine(gate, warm.wait)
    assert engine.state == "new"
    with engine:
        with pytest.raises(NotReady, match="warming up"):
            engine.submit("early", [0], SMALL)
        assert value(engine, "fp4dit_ready") == 0
        with pytest.raises(NotReady):
            engine.wait_until_ready(0.01)
        warm.set()
        engine.wait_until_ready(30)
        assert value(engine, "fp4dit_ready") == 1


def test_a_failed_warm_up_is_told() -> None:
    def fail() -> None:
        raise MemoryError("too large")

    with Engine(lambda *_: [], fail) as engine:
        with pytest.raises(NotReady, match="failed to warm up: too large"):
            engine.wait_until_ready(30)
        with pytest.raises(NotReady, match="too large"):
            engine.submit("a", [0], SMALL)
        assert engine.state == "failed"
        assert isinstance(engine.failure, MemoryError)


def test_closing_finishes_what_runs_and_refuses_the_rest(gate: Gate) -> None:
    engine = ready(gate)
    running = engine.submit("running", [0], SMALL)[0]
    assert gate.entered.wait(30)
    waiting = engine.submit("waiting", [0], SMALL)[0]
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(NotReady, match="shutting down"):
        waiting.result(30)
    assert not running.done()
    with pytest.raises(NotReady, match="shutting down"):
        engine.submit("late", [0], SMALL)
    gate.open.set()
    closing.join(30)
    assert running.result(0).shape == (8, 8, 3)
    engine.close()  # twice is no harm


class Stepper:
    """Draws in steps of a moment each, as a pipeline does; ``checks`` is called between them."""

    def __init__(self, steps: int = 10_000) -> None:
        self.steps, self.taken, self.started = steps, 0, threading.Event()
        self.check: Callable[[], None] = lambda: None

    def __call__(self, style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        for _ in range(self.steps if "long" in prompts else 1):
            self.started.set()
            time.sleep(0.002)
            self.taken += 1
            self.check()
        return [picture(style, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


@pytest.mark.parametrize("why", ["cancelled", "out of time"])
def test_a_running_batch_that_nobody_waits_for_ends_at_its_next_step(why: str) -> None:
    stepper = Stepper()
    with ready(stepper, max_batch=2) as engine:
        stepper.check = engine.check
        futures = engine.submit("long", [0, 1], SMALL, timeout=0.05 if why == "out of time" else 60)
        assert stepper.started.wait(30)
        if why == "cancelled":
            futures[0].cancel()
            time.sleep(0.05)
            assert not futures[1].done()  # somebody still waits for the other one
            futures[1].cancel()
        assert engine.submit("next", [0], SMALL)[0].result(10).shape == (8, 8, 3)
        assert stepper.taken < stepper.steps
        for future in futures:
            with pytest.raises(TimeoutError, match="nobody waited"):
                future.result(0)


def test_closing_has_a_deadline() -> None:
    stepper = Stepper()
    engine = ready(stepper)
    stepper.check = engine.check
    running = engine.submit("long", [0], SMALL)[0]
    assert stepper.started.wait(30)
    began = time.monotonic()
    engine.close(timeout=0.1)
    assert time.monotonic() - began < 10 and stepper.taken < stepper.steps
    with pytest.raises(TimeoutError):
        running.result(0)


# --- previews --------------------------------------------------------------------------------------------------------


class Shower:
    """Draws in ``steps`` steps, each of which can be looked at; the first ``failures`` drawings fail halfway."""

    def __init__(self, failures: int = 0):
        self.failures, self.looked = failures, []  # type: ignore[var-annotated]
        self.check: Callable[..., None] = lambda *_: None

    def __call__(self, style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        def look(places: Sequence[int]) -> list[Image]:
            self.looked.append([*places])
            return [np.full((style.height, style.width, 3), 100 * place + done, np.uint8) for place in places]

        for done in range(1, style.steps + 1):
            self.check(done, look)
            if self.failures and done == style.steps // 2:
                self.failures -= 1
                raise RuntimeError("out of memory")
        return [picture(style, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def shown(engine: Engine, count: int, steps: int, others: int = 0) -> list[tuple[int, int]]:
    """Numbers and values of the previews of one image, drawn behind ``others`` that nobody looks at."""
    seen: list[tuple[int, int]] = []
    style = Style(8, 8, steps)
    if others:
        engine.submit("other", range(others), style)
    wish = Preview(count, lambda number, image: seen.append((number, int(image[0, 0, 0]))))
    engine.submit("looked at", [0], style, preview=wish)[0].result(30)
    return seen


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(0, 8, []), (1, 8, [(0, 4)]), (3, 8, [(0, 2), (1, 4), (2, 6)]), (3, 20, [(0, 5), (1, 10), (2, 15)]), (3, 1, [])],
)
def test_previews_are_spread_over_the_steps(count: int, steps: int, expected: list[tuple[int, int]]) -> None:
    shower = Shower()
    with ready(shower) as engine:
        shower.check = engine.check
        assert shown(engine, count, steps) == expected
    assert len(shower.looked) == len(expected)


def test_only_what_is_wished_for_is_looked_at() -> None:
    shower = Shower()
    with ready(shower, window=0.2) as engine:
        shower.check = engine.check
        assert shown(engine, 1, 8, others=2) == [(0, 204)]
    assert shower.looked == [[2]]


def test_a_preview_is_shown_once_though_its_batch_is_drawn_again() -> None:
    shower = Shower(failures=1)
    with ready(shower, window=0.2) as engine:
        shower.check = engine.check
        assert shown(engine, 3, 8, others=1) == [(0, 102), (1, 104), (2, 6)]


# --- with a real pipeline --------------------------------------------------------------------------------------------


def test_images_do_not_depend_on_their_neighbours(tiny_quantized: Any) -> None:
    painter = Painter(tiny_quantized, 4, same_bits=True)
    style = painter.default
    together = painter.draw(style, ["a red cat", "a blue dog", "green tree", "a house"], [5, 6, 7, 8])
    for prompt, seed, image in zip(["a red cat", "a blue dog", "green tree"], [5, 6, 7], together[:3], strict=True):
        np.testing.assert_array_equal(painter.draw(style, [prompt], [seed])[0], image)
    assert not np.array_equal(together[0], painter.draw(style, ["a red cat"], [6])[0])


def test_images_are_those_of_the_pipeline(tiny_quantized: Any) -> None:
    painter = Painter(tiny_quantized)
    assert painter.default == Style(32, 32, 2)
    assert painter.multiple == 8
    for style in (Style(32, 32, 2), Style(48, 32, 3)):
        (image,) = painter.draw(style, ["a red cat"], [3])
        call = tiny_quantized.generation_defaults | {"num_inference_steps": style.steps, "width": style.width}
        expected = tiny_quantized("a red cat", generator=torch.Generator().manual_seed(3), **call).images[0]
        np.testing.assert_array_equal(image, np.asarray(expected))


def test_a_pipeline_is_stopped_between_its_steps(tiny_quantized: Any) -> None:
    painter = Painter(tiny_quantized)
    taken: list[int] = []

    def stop(done: int, look: Look | None) -> None:
        taken.append(done)
        if done == 3:
            raise Abandoned

    painter.between_steps = stop
    with pytest.raises(Abandoned):
        painter.draw(Style(32, 32, 10), ["a red cat"], [3])
    assert taken == [1, 2, 3]


def test_an_image_is_shown_while_it_is_drawn(tiny_quantized: Any) -> None:
    """The last look at it is the image itself; others are alone in that they are looked at."""
    painter = Painter(tiny_quantized)
    assert painter.previews
    looks: dict[int, list[Image]] = {}
    painter.between_steps = lambda done, look: looks.update({done: [*look([1])]}) if look else None  # type: ignore[func-returns-value]
    style = Style(32, 32, 4)
    images = painter.draw(style, ["a red cat", "a blue dog"], [3, 4])
    assert [*looks] == [1, 2, 3, 4]
    np.testing.assert_allclose(
        looks[4][0].astype(int), images[1].astype(int), atol=1
    )  # a batch of one sums in another order
    apart = [float(np.abs(look[0].astype(float) - images[1]).mean()) for look in looks.values()]
    assert apart[0] > apart[2] > apart[3]
    painter.between_steps = lambda done, look: None
    np.testing.assert_array_equal(painter.draw(style, ["a red cat", "a blue dog"], [3, 4]), images)


def test_numbers_that_are_no_image_are_an_error(tiny_quantized: Any) -> None:
    pipe = copy.copy(tiny_quantized)
    vae = copy.deepcopy(pipe.vae)
    vae.decoder.conv_out.bias.data.fill_(float("nan"))
    pipe.register_modules(vae=vae)
    with pytest.raises(RuntimeError, match="NaN"), torch.no_grad():
        Painter(pipe).draw(Style(32, 32, 1), ["a cat"], [0])


def test_pipelines_that_draw_no_images_are_refused() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(ValueError, match="DDPMPipeline cannot be served: its call takes no height, prompt, width"):
        Painter(DDPMPipeline(unet, DDPMScheduler()))
