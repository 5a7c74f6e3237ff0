"""HTTP application of an engine: the OpenAI images API, health checks, metrics and limits."""

import asyncio
import base64
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import ConfigDict, Field
from starlette.middleware.cors import CORSMiddleware

from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Image, NotReady, QueueFull, Style
from fp4dit_ao.serving.error_responses import answer_errors
from fp4dit_ao.serving.middleware import ApiKey, BodyLimit, RequestCounter
from fp4dit_ao.serving.pictures import Pictures
from fp4dit_ao.serving.schema import (
    MAX_SEED,
    ApiError,
    ErrorResponse,
    Health,
    ImageData,
    ImageRequest,
    ImageResponse,
    ModelCard,
    ModelList,
    encode,
)

GENERATIONS = "/v1/images/generations"
FILES = "/v1/images/files"
_LAST_STEP = 5.0
"""Seconds that a batch which nobody waits for may go on at shutdown."""
_BODY_BYTES, _BODY_REST = 12, 4096
"""Allowed bytes of a request's body: per character of the longest prompt (JSON may escape one as 12 bytes), and for all
other fields."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        prompt: most characters of the prompt.
        n: most images.
        side: most pixels of width and of height; None for twice the larger side of the model's own size. What an image costs
            grows faster than its area.
        steps: most denoising steps.
        timeout: seconds after which the request is answered with 504.
        shutdown: seconds that accepted requests may take once the server is asked to end.
    """

    prompt: int = 2000
    n: int = 4
    side: int | None = None
    steps: int = 100
    timeout: float = 120.0
    shutdown: float = 30.0


@dataclass(frozen=True)
class Access:
    """Requests that are answered: by key, and by the web page that sends them.

    Attributes:
        api_key: key that requests must bring; None asks for none.
        origins: origins whose pages may ask from a browser (CORS), such as ``"https://example.org"``, or ``"*"``.
    """

    api_key: str | None = field(default=None, repr=False)
    origins: Sequence[str] = ()


def create_app(
    engine: Engine,
    name: str,
    default: Style,
    multiple: int = 8,
    limits: Limits = Limits(),
    access: Access = Access(),
) -> FastAPI:
    """Makes the application, which starts ``engine`` at startup and closes it at shutdown.

    Args:
        engine: an engine that is not started yet.
        name: name of the model in ``/v1/models``.
        default: size and steps of requests that do not give them.
        multiple: width and height must be multiples of this.
        limits: limits of one request.
        access: who may ask.

    Raises:
        ValueError: the queue cannot hold the largest request, or the default exceeds the limits.
    """
    if limits.n > engine.batching.max_queue:
        raise ValueError(f"a queue of {engine.batching.max_queue} images cannot hold a request for {limits.n}")
    own = max(default.width, default.height)
    side = limits.side if limits.side is not None else 2 * own
    limits = replace(limits, side=side)
    if own > side or default.steps > limits.steps:
        raise ValueError(f"the model's own {default} is beyond the limits of {side} pixels and {limits.steps} steps")
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close, _LAST_STEP)

    app = FastAPI(
        title="fp4dit_ao", summary="A 4-bit diffusion transformer behind the OpenAI images API.", lifespan=lifespan,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.add_middleware(BodyLimit, limit=_BODY_REST + _BODY_BYTES * limits.prompt, path=GENERATIONS)
    if access.api_key is not None:
        app.add_middleware(ApiKey, key=access.api_key, open_paths=("/health", f"{FILES}/"))
    app.add_middleware(RequestCounter, metrics=engine.metrics, path=GENERATIONS)
    if access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["*"], allow_headers=["*"])
    answer_errors(app)
    stored = Pictures()
    refusals: dict[int | str, dict[str, object]] = {status: {"model": ErrorResponse} for status in ("4XX", "5XX")}

    @app.get("/health/live", responses=refusals)
    def live() -> Health:
        """Answers 200 unless the model failed to warm up."""
        if engine.state == "failed":
            raise ApiError(500, f"the model failed to warm up: {engine.failure}", "failed")
        return Health(status="live")

    @app.get("/health", responses=refusals)
    @app.get("/health/ready", responses=refusals)
    def ready() -> Health:
        """Answers 200 once the model is warmed up, 503 before."""
        if not engine.ready:
            raise ApiError(503, f"not ready: {engine.state}", "not_ready", retry_after=1)
        return Health(status="ready")

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> ModelList:
        """Lists the one model that is served."""
        return ModelList(data=[ModelCard(id=name, created=created)])

    @app.get("/v1/models/{model}", responses=refusals)
    def model(model: str) -> ModelCard:
        """Describes the model; 404 for any other name."""
        _known(model, name)
        return ModelCard(id=name, created=created)

    @app.get(f"{FILES}/{{name}}", responses=refusals, response_class=Response)
    def file(name: str) -> Response:
        """A picture that an answer named by its URL, as long as it is kept."""
        found = stored.get(name)
        if found is None:
            raise ApiError(404, f"there is no picture {name}, or not any more", "not_found")
        return Response(found[0], media_type=found[1])

    class Asked(ImageRequest):
        model_config = ConfigDict(title="ImageRequest")
        prompt: str = Field(min_length=1, max_length=limits.prompt, pattern=r"\S", description="What to draw.")
        n: int = Field(1, ge=1, le=limits.n, description="How many images, of seeds seed, seed + 1, …")
        steps: int | None = Field(None, ge=1, le=limits.steps, description="Denoising steps.")

    @app.post(GENERATIONS, responses=refusals, response_model_exclude_none=True)
    async def generations(asked: Asked, request: Request) -> ImageResponse:
        """Draws ``n`` images of a prompt."""
        style = _style(asked, name, default, multiple, limits)
        first = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        seeds = [(first + i) % (MAX_SEED + 1) for i in range(asked.n)]
        images = await _drawn(engine, asked.prompt, seeds, style, limits.timeout, request)
        pictures = await asyncio.to_thread(
            lambda: [encode(image, asked.output_format, asked.output_compression) for image in images]
        )

        def shown(picture: bytes, seed: int) -> ImageData:
            if asked.response_format == "url":
                kept = stored.add(picture, asked.output_format)
                return ImageData(url=str(request.url_for("file", name=kept)), seed=seed)
            return ImageData(b64_json=base64.b64encode(picture).decode("ascii"), seed=seed)

        return ImageResponse(
            created=int(time.time()), size=f"{style.width}x{style.height}", steps=style.steps,
            output_format=asked.output_format,
            data=[shown(picture, seed) for picture, seed in zip(pictures, seeds, strict=True)],
        )  # fmt: skip

    return app


# --- what is asked for -----------------------------------------------------------------------------------------------


def _known(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(404, f"the model {asked!r} does not exist; this server has {name!r}", "model_not_found", "model")


def _style(asked: ImageRequest, name: str, default: Style, multiple: int, limits: Limits) -> Style:
    """Size and steps of a request; raises ``ApiError`` if it names another model or exceeds the limits."""
    _known(asked.model, name)
    width, height = asked.dimensions() or (default.width, default.height)
    if max(width, height) > (limits.side or 0) or width % multiple or height % multiple:
        raise ApiError(
            400, f"size is {width}x{height}; each side must be a multiple of {multiple}, and at most {limits.side}",
            "invalid_size", "size",
        )  # fmt: skip
    return Style(width, height, asked.steps or default.steps)


async def _drawn(
    engine: Engine, prompt: str, seeds: list[int], style: Style, timeout: float, request: Request
) -> list[Image]:
    """Waits for the images of a request; gives up after ``timeout`` seconds, or if the client disconnects."""
    try:
        futures = engine.submit(prompt, seeds, style, timeout)
    except QueueFull as error:
        raise ApiError(429, f"{error}; try again later", "queue_full", retry_after=error.retry_after) from error
    except NotReady as error:
        raise ApiError(503, str(error), "not_ready", retry_after=1) from error
    together = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
    together.add_done_callback(
        lambda ended: ended.cancelled() or ended.exception()
    )  # looked at, so asyncio does not log it
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        waited: set[asyncio.Future[Any]] = {together, gone}
        await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if together.done():
            return await together
        if gone.done():
            raise ApiError(499, "the client closed the connection", "client_closed")
        raise TimeoutError
    except TimeoutError as error:
        raise ApiError(504, f"no image within {timeout:g} s; ask for fewer steps, or later", "timeout") from error
    except NotReady as error:
        raise ApiError(503, str(error), "not_ready", retry_after=1) from error
    finally:
        gone.cancel()
        for future in futures:
            future.cancel()  # images that still wait leave the queue, and a running batch of no others ends at its next step
        together.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
