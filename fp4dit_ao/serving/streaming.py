"""Server-sent events of one image: previews while it is drawn, then the image; as the OpenAI images API streams them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from fp4dit_ao.serving.engine_types import Image, Preview
from fp4dit_ao.serving.error_responses import failed

_UNMETERED = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}  # fmt: skip
"""OpenAI's events have a ``usage``; nothing is metered here."""


class Previews:
    """Previews of one image, on their way from the engine's thread to the event loop that this was made in.

    Args:
        count: how many are wished for.
    """

    def __init__(self, count: int):
        loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[int, Image]] = asyncio.Queue()

        def arrive(number: int, image: Image) -> None:
            loop.call_soon_threadsafe(self.arrived.put_nowait, (number, image))

        self.wish = Preview(count, arrive)


@dataclass(frozen=True)
class Stream:
    """The events of one image.

    Attributes:
        kind: ``"image_generation"`` or ``"image_edit"``, with which the types of events begin.
        picture: encodes an image as base64.
        facts: what every event says, such as the size.
        timeout: seconds after which it ends with an error.
    """

    kind: str
    picture: Callable[[Image], str]
    facts: Mapping[str, object]
    timeout: float

    async def events(self, future: "Future[Image]", previews: Previews) -> AsyncIterator[str]:
        """Yields the events, the last of which is the image or an error; an image that nobody waits for is cancelled."""
        drawn = asyncio.wrap_future(future)
        drawn.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        deadline = time.monotonic() + self.timeout
        try:
            while not drawn.done() or not previews.arrived.empty():
                waiting = asyncio.ensure_future(previews.arrived.get())
                either: set[asyncio.Future[tuple[int, Image]] | asyncio.Future[Image]] = {waiting, drawn}
                await asyncio.wait(either, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    number, image = waiting.result()
                    yield await self._event("partial_image", image, {"partial_image_index": number})
                    continue
                waiting.cancel()
                if not drawn.done():
                    raise TimeoutError
            yield await self._event("completed", await drawn, {"usage": _UNMETERED})
        except Exception as error:
            yield _text("error", {"type": "error", **failed(error, self.timeout).body})
        finally:
            future.cancel()

    async def _event(self, name: str, image: Image, more: Mapping[str, object]) -> str:
        event, encoded = f"{self.kind}.{name}", await asyncio.to_thread(self.picture, image)
        data = {"type": event, "b64_json": encoded, "created_at": int(time.time()), **self.facts, **more}
        return _text(event, data)


def _text(event: str, data: Mapping[str, object]) -> str:
    return f"event: {event}\ndata: {json.dumps(data)}\n\n"
