"""The HTTP application before an engine: the OpenAI images API, health, metrics, limits and clear errors."""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException

from fp4dit_ao.serving.engine import Engine, Image, NotReady, QueueFull, Style
from fp4dit_ao.serving.metrics import Metrics
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

log = logging.getLogger(__name__)
GENERATIONS = "/v1/images/generations"
_BODY_BYTES, _BODY_REST = 12, 4096
"""Bytes of a request's body for every character of the longest prompt (JSON may write one in 12), and for all else."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt: characters.
        n: images.
        side: pixels, of width and of height.
        steps: of denoising.
        timeout: seconds until it is answered with 504.
    """

    prompt: int = 2000
    n: int = 4
    side: int = 2048
    steps: int = 100
    timeout: float = 120.0


def create_app(engine: Engine, name: str, default: Style, multiple: int = 8, limits: Limits = Limits()) -> FastAPI:
    """The application. It starts ``engine`` when it starts, and closes it when it ends.

    Args:
        engine: not yet started.
        name: of the model, in ``/v1/models``.
        default: size and steps of a request that asks for none.
        multiple: of which width and height must be multiples.
        limits: what a request may ask for.

    Raises:
        ValueError: the limits contradict the queue or the default.
    """
    if limits.n > engine.batching.max_queue:
        raise ValueError(f"a queue of {engine.batching.max_queue} images cannot hold a request for {limits.n}")
    if max(default.width, default.height) > limits.side or default.steps > limits.steps:
        raise ValueError(
            f"the model's own {default} is beyond the limits of {limits.side} pixels and {limits.steps} steps"
        )
    created = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="fp4dit_ao", summary="A 4-bit diffusion transformer behind the OpenAI images API.", lifespan=lifespan,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.add_middleware(_BodyLimit, limit=_BODY_REST + _BODY_BYTES * limits.prompt)
    app.add_middleware(_Counted, metrics=engine.metrics)
    _answer_errors(app)
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ("4XX", "5XX")}

    @app.get("/health/live", responses=refusals)
    def live() -> Health:
        """200 unless the model failed to warm up."""
        if engine.state == "failed":
            raise ApiError(500, f"the model failed to warm up: {engine.failure}", "failed")
        return Health(status="live")

    @app.get("/health/ready", responses=refusals)
    def ready() -> Health:
        """200 once the model is warmed up, 503 before."""
        if not engine.ready:
            raise ApiError(503, f"not ready: {engine.state}", "not_ready", retry_after=1)
        return Health(status="ready")

    @app.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """For Prometheus."""
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name, created=created)])

    @app.get("/v1/models/{model}", responses=refusals)
    def model(model: str) -> ModelCard:
        _known(model, name)
        return ModelCard(id=name, created=created)

    class Asked(ImageRequest):
        model_config = ConfigDict(title="ImageRequest")
        prompt: str = Field(min_length=1, max_length=limits.prompt, pattern=r"\S", description="What to draw.")
        n: int = Field(1, ge=1, le=limits.n, description="How many images, of seeds seed, seed + 1, …")
        steps: int | None = Field(None, ge=1, le=limits.steps, description="Denoising steps.")

    @app.post(GENERATIONS, responses=refusals)
    async def generations(asked: Asked, request: Request) -> ImageResponse:
        """Draw ``n`` images of a prompt."""
        style = _style(asked, name, default, multiple, limits)
        first = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        seeds = [(first + i) % (MAX_SEED + 1) for i in range(asked.n)]
        images = await _drawn(engine, asked.prompt, seeds, style, limits.timeout, request)
        pictures = await asyncio.to_thread(
            lambda: [encode(image, asked.output_format, asked.output_compression) for image in images]
        )
        return ImageResponse(
            created=int(time.time()), size=f"{style.width}x{style.height}", steps=style.steps,
            output_format=asked.output_format,
            data=[ImageData(b64_json=text, seed=seed) for text, seed in zip(pictures, seeds, strict=True)],
        )  # fmt: skip

    return app


# --- what is asked for -----------------------------------------------------------------------------------------------


def _known(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(404, f"the model {asked!r} does not exist; this server has {name!r}", "model_not_found", "model")


def _style(asked: ImageRequest, name: str, default: Style, multiple: int, limits: Limits) -> Style:
    """Size and steps of a request that is within the limits."""
    _known(asked.model, name)
    width, height = asked.dimensions() or (default.width, default.height)
    if max(width, height) > limits.side or width % multiple or height % multiple:
        raise ApiError(
            400, f"size is {width}x{height}; each side must be a multiple of {multiple}, and at most {limits.side}",
            "invalid_size", "size",
        )  # fmt: skip
    return Style(width, height, asked.steps or default.steps)


async def _drawn(
    engine: Engine, prompt: str, seeds: list[int], style: Style, timeout: float, request: Request
) -> list[Image]:
    """The images; given up when time is over, or when nobody listens any more."""
    try:
        futures = engine.submit(prompt, seeds, style, timeout)
    except QueueFull as error:
        raise ApiError(429, f"{error}; try again later", "queue_full", retry_after=error.retry_after) from error
    except NotReady as error:
        raise ApiError(503, str(error), "not_ready", retry_after=1) from error
    together = asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
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
            future.cancel()  # what still waits leaves the queue
        together.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- errors ----------------------------------------------------------------------------------------------------------


def _answer(error: ApiError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return JSONResponse(error.body, error.status, headers)


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(_explained(error))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        answer = _answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return _answer(ApiError(500, "the server failed to draw this; its log says why", "internal_error"))


def _explained(error: RequestValidationError) -> ApiError:
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"][1:] if isinstance(part, str)) or None
    if found["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {found.get('ctx', {}).get('error', found['msg'])}", "invalid_json"
        )
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {where}", "unknown_parameter", where)
    if where == "response_format":
        return ApiError(
            400,
            "response_format must be 'b64_json': this server stores no images, so it has no URLs",
            "unsupported",
            where,
        )
    if where is None:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json", found["type"])
    message = found["msg"][0].lower() + found["msg"][1:]
    return ApiError(400, f"{where}: {message}", found["type"], where)


# --- middleware ------------------------------------------------------------------------------------------------------


class _Counted:
    """Counts requests for images, and times them to the last byte, by status code."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != GENERATIONS:
            await self.app(scope, receive, send)
            return
        began, code = time.monotonic(), 500

        async def watched(message: Any) -> None:
            nonlocal code
            code = message.get("status", code)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.requests.labels(code).inc()
            self.metrics.request_seconds.labels(code).observe(time.monotonic() - began)


class _BodyLimit:
    """Answers 413 to a body of more than ``limit`` bytes, before it is read whole."""

    def __init__(self, app: Any, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, size = [], 0
        while scope["method"] in ("POST", "PUT", "PATCH"):
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self.limit:
                answer = _answer(ApiError(413, f"the body is larger than {self.limit} bytes", "too_large"))
                await answer(scope, receive, send)
                return
            if not message.get("more_body"):
                break

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)
