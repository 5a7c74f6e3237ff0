"""HTTP application of an engine: the OpenAI images API, health checks, metrics and limits."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from pydantic import Field, create_model
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import StreamingResponse

from fp4dit_ao.serving import uploads
from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Edit, Style
from fp4dit_ao.serving.error_responses import answer_errors
from fp4dit_ao.serving.middleware import ApiKey, BodyLimit, RequestCounter
from fp4dit_ao.serving.pictures import Pictures
from fp4dit_ao.serving.schema import (
    ApiError,
    EditRequest,
    ErrorResponse,
    Health,
    ImageRequest,
    ImageResponse,
    ModelCard,
    ModelList,
    form_schema,
    from_form,
)
from fp4dit_ao.serving.studio import Studio

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
FILES = "/v1/images/files"
_LAST_STEP = 5.0
"""Seconds that a batch which nobody waits for may go on at shutdown."""
_BODY_BYTES, _BODY_REST = 12, 4096
"""Allowed bytes of a request's body: per character of the longest prompt (JSON may escape one as 12 bytes), and for all
other fields."""
_STREAMED: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Images, or events of one."}
}
"""What a request may be answered with besides JSON."""
_BODY_PICTURES = 32 << 20
"""Allowed bytes of the files of an edit."""


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
class Abilities:
    """What the pipeline can do besides drawing from text.

    Attributes:
        previews: show images while they are drawn.
        edits: start from an image.
        masks: start from an image, and keep a part of it.
    """

    previews: bool = False
    edits: bool = False
    masks: bool = False


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
    abilities: Abilities = Abilities(),
) -> FastAPI:
    """Makes the application, which starts ``engine`` at startup and closes it at shutdown.

    Args:
        engine: an engine that is not started yet.
        name: name of the model in ``/v1/models``.
        default: size and steps of requests that do not give them.
        multiple: width and height must be multiples of this.
        limits: limits of one request.
        access: who may ask.
        abilities: what can be asked for.

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
    text = _BODY_REST + _BODY_BYTES * limits.prompt
    app.add_middleware(BodyLimit, limits={GENERATIONS: text, EDITS: _BODY_PICTURES + text})
    if access.api_key is not None:
        app.add_middleware(ApiKey, key=access.api_key, open_paths=("/health", f"{FILES}/"))
    app.add_middleware(RequestCounter, metrics=engine.metrics, paths=(GENERATIONS, EDITS))
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

    bounds: dict[str, Any] = {
        "prompt": (str, Field(min_length=1, max_length=limits.prompt, pattern=r"\S", description="What to draw.")),
        "n": (int, Field(1, ge=1, le=limits.n, description="How many images, of seeds seed, seed + 1, …")),
        "steps": (int | None, Field(None, ge=1, le=limits.steps, description="Denoising steps.")),
    }
    asked_image: type[ImageRequest] = create_model("ImageRequest", __base__=ImageRequest, **bounds)
    asked_edit: type[EditRequest] = create_model("EditRequest", __base__=EditRequest, **bounds)
    studio = Studio(engine, stored, limits.timeout, abilities.previews)

    @app.post(
        GENERATIONS, responses=refusals | _STREAMED, response_model=ImageResponse, response_model_exclude_none=True
    )
    async def generations(body: asked_image, request: Request) -> ImageResponse | StreamingResponse:  # type: ignore[valid-type]
        """Draws ``n`` images of a prompt; with ``stream``, shows one while it is drawn."""
        asked = cast(ImageRequest, body)
        style = _style(asked, asked.dimensions() or (default.width, default.height), name, default, multiple, limits)
        return await studio.answer("image_generation", asked, style, request)

    form = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form_schema(asked_edit)}}}}

    @app.post(
        EDITS,
        responses=refusals | _STREAMED,
        response_model=ImageResponse,
        response_model_exclude_none=True,
        openapi_extra=form,
    )
    async def edits(request: Request) -> ImageResponse | StreamingResponse:
        """Draws ``n`` images that start from another one, or, with a mask, fill in a part of it."""
        if not abilities.edits:
            raise ApiError(400, f"{name} draws from text alone: diffusers has no image-to-image form of it", "no_edits")
        fields, files = await uploads.form(request)
        asked: EditRequest = from_form(asked_edit, fields)
        if "image" not in files or set(files) - {"image", "mask"}:
            raise ApiError(400, "give one file named image, and one named mask if you like", "invalid_form", "image")
        if "mask" in files and not abilities.masks:
            raise ApiError(400, f"{name} takes no mask: diffusers has no inpainting form of it", "no_edits", "mask")
        pictures = await asyncio.to_thread(lambda: {key: uploads.picture(data, key) for key, data in files.items()})
        size = asked.dimensions() or fitting(pictures["image"].size, multiple, limits.side or 0)
        style = _style(asked, size, name, default, multiple, limits)
        if int(style.steps * asked.strength) < 1:
            raise ApiError(
                400,
                f"strength: {asked.strength:g} of {style.steps} steps is none; give more of either",
                "no_steps",
                "strength",
            )
        mask = uploads.hole(pictures["mask"], size) if "mask" in pictures else None
        edit = Edit(uploads.pixels(pictures["image"], size), mask, asked.strength)
        return await studio.answer("image_edit", asked, replace(style, edit=edit), request)

    return app


# --- what is asked for -----------------------------------------------------------------------------------------------


def _known(asked: str | None, name: str) -> None:
    if asked not in (None, name):
        raise ApiError(404, f"the model {asked!r} does not exist; this server has {name!r}", "model_not_found", "model")


def _style(
    asked: ImageRequest, size: tuple[int, int], name: str, default: Style, multiple: int, limits: Limits
) -> Style:
    """Size and steps of a request; raises ``ApiError`` if it names another model or exceeds the limits."""
    _known(asked.model, name)
    width, height = size
    if max(width, height) > (limits.side or 0) or width % multiple or height % multiple:
        raise ApiError(
            400, f"size is {width}x{height}; each side must be a multiple of {multiple}, and at most {limits.side}",
            "invalid_size", "size",
        )  # fmt: skip
    return Style(width, height, asked.steps or default.steps)


def fitting(size: tuple[int, int], multiple: int, side: int) -> tuple[int, int]:
    """Width and height of about the same shape that are multiples of ``multiple`` and at most ``side``."""
    factor = min(1.0, side / max(size))
    width, height = (max(1, round(x * factor / multiple)) * multiple for x in size)
    return min(width, side // multiple * multiple), min(height, side // multiple * multiple)
