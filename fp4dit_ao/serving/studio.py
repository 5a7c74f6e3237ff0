"""Answers to requests for images: drawn by the engine, encoded, whole or as a stream."""

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import StreamingResponse

from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Image, NotReady, Preview, QueueFull, Style
from fp4dit_ao.serving.error_responses import failed
from fp4dit_ao.serving.pictures import Pictures
from fp4dit_ao.serving.schema import MAX_SEED, ApiError, ImageData, ImageRequest, ImageResponse, encode
from fp4dit_ao.serving.streaming import Previews, Stream


@dataclass(frozen=True)
class Studio:
    """Draws what requests ask for.

    Attributes:
        engine: draws.
        stored: pictures that answers name by their URL.
        timeout: seconds after which a request is answered with 504.
        previews: whether the engine shows images while it draws them.
    """

    engine: Engine
    stored: Pictures
    timeout: float
    previews: bool

    async def answer(
        self, kind: str, asked: ImageRequest, style: Style, request: Request
    ) -> ImageResponse | StreamingResponse:
        """Images of a request, or their events.

        Args:
            kind: ``"image_generation"`` or ``"image_edit"``.
            asked: the request.
            style: its size and steps, and the image to start from.
            request: its connection.

        Raises:
            ApiError: the images are not drawn.
        """
        first = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        seeds = [(first + i) % (MAX_SEED + 1) for i in range(asked.n)]
        if asked.stream:
            return self._streamed(kind, asked, style, seeds)
        if asked.partial_images:
            raise ApiError(
                400, "partial_images are parts of a stream; ask for stream, too", "no_stream", "partial_images"
            )
        images = await self._drawn(asked.prompt, seeds, style, request)
        pictures = await asyncio.to_thread(
            lambda: [encode(image, asked.output_format, asked.output_compression) for image in images]
        )

        def shown(picture: bytes, seed: int) -> ImageData:
            if asked.response_format == "url":
                kept = self.stored.add(picture, asked.output_format)
                return ImageData(url=str(request.url_for("file", name=kept)), seed=seed)
            return ImageData(b64_json=base64.b64encode(picture).decode("ascii"), seed=seed)

        return ImageResponse(
            created=int(time.time()), size=f"{style.width}x{style.height}", steps=style.steps,
            output_format=asked.output_format,
            data=[shown(picture, seed) for picture, seed in zip(pictures, seeds, strict=True)],
        )  # fmt: skip

    def _streamed(self, kind: str, asked: ImageRequest, style: Style, seeds: Sequence[int]) -> StreamingResponse:
        if asked.n > 1 or asked.response_format == "url":
            wrong = "n" if asked.n > 1 else "response_format"
            raise ApiError(400, f"{wrong}: a stream holds one image, as b64_json", "no_stream", wrong)
        if asked.partial_images and not self.previews:
            message = "partial_images: this model cannot show what it is drawing; leave them out"
            raise ApiError(400, message, "no_previews", "partial_images")
        previews = Previews(asked.partial_images)
        (future,) = self._submitted(asked.prompt, seeds, style, previews.wish if asked.partial_images else None)

        def picture(image: Image) -> str:
            return base64.b64encode(encode(image, asked.output_format, asked.output_compression)).decode("ascii")

        facts = {
            "size": f"{style.width}x{style.height}", "quality": asked.quality, "background": "opaque",
            "output_format": asked.output_format, "seed": seeds[0], "steps": style.steps,
        }  # fmt: skip
        stream = Stream(kind, picture, facts, self.timeout)
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(stream.events(future, previews), media_type="text/event-stream", headers=headers)

    def _submitted(
        self, prompt: str, seeds: Sequence[int], style: Style, preview: Preview | None = None
    ) -> "list[Future[Image]]":
        try:
            return self.engine.submit(prompt, seeds, style, self.timeout, preview)
        except QueueFull as error:
            raise ApiError(429, f"{error}; try again later", "queue_full", retry_after=error.retry_after) from error
        except NotReady as error:
            raise failed(error, self.timeout) from error

    async def _drawn(self, prompt: str, seeds: Sequence[int], style: Style, request: Request) -> list[Image]:
        """Waits for the images of a request; gives up after ``timeout`` seconds, or if the client disconnects."""
        futures = self._submitted(prompt, seeds, style)
        together = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        together.add_done_callback(
            lambda ended: ended.cancelled() or ended.exception()
        )  # looked at, so asyncio does not log it
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waited: set[asyncio.Future[list[Image]] | asyncio.Future[None]] = {together, gone}
            await asyncio.wait(waited, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if together.done():
                return await together
            if gone.done():
                raise ApiError(499, "the client closed the connection", "client_closed")
            raise TimeoutError
        except (TimeoutError, NotReady) as error:
            raise failed(error, self.timeout) from error
        finally:
            gone.cancel()
            for future in futures:
                future.cancel()  # what waits leaves the queue, and a running batch of no others ends at its next step
            together.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
