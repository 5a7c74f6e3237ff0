"""Requests and responses of the supported part of the OpenAI images API."""

import io
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from fastapi.exceptions import RequestValidationError
from PIL import Image as Pillow
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fp4dit_ao.serving.engine_types import Image

Edited = TypeVar("Edited", bound="EditRequest")
MAX_SEED = 2**63 - 1


def _nullable(schema: dict[str, Any]) -> None:
    """Lets every optional property of a JSON schema be null, too."""
    for name, own in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in own.get("anyOf", ()):
            shown = {key: own.pop(key) for key in ("title", "description", "default") if key in own}
            schema["properties"][name] = {"anyOf": [own, {"type": "null"}], **shown}


class ImageRequest(BaseModel):
    """Body of ``POST /v1/images/generations``. ``seed`` and ``steps`` are extensions. Null is as good as left out."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    prompt: str = Field(min_length=1, description="What to draw.")
    model: str | None = Field(None, description="The name in /v1/models, if any.")
    n: int = Field(1, ge=1, description="How many images, of seeds seed, seed + 1, …")
    size: str = Field("auto", pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$", description="WIDTHxHEIGHT in pixels.")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the first image's noise; random if left out."
    )
    steps: int | None = Field(None, ge=1, description="Denoising steps.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="URLs are on this server, which keeps its latest images for a while."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality in percent, for jpeg and webp.")
    background: Literal["auto", "opaque"] = "auto"
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] = Field(
        "auto", description="Ignored: there is one; say steps instead."
    )
    style: Literal["vivid", "natural"] = Field("vivid", description="Ignored.")
    moderation: Literal["auto", "low"] = Field("auto", description="Ignored: nothing is moderated.")
    stream: bool = Field(False, description="Answer with server-sent events, of one image.")
    partial_images: int = Field(
        0, ge=0, le=3, description="Previews in a stream; fewer if there are not as many steps."
    )
    user: str | None = Field(None, description="Ignored.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        optional = set(cls.model_fields) - {"prompt"}
        return {name: value for name, value in data.items() if value is not None or name not in optional}

    def dimensions(self) -> tuple[int, int] | None:
        """Width and height in pixels; None for ``"auto"``."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.size)
        return (int(found[1]), int(found[2])) if found else None


class EditRequest(ImageRequest):
    """Fields of ``POST /v1/images/edits`` besides its files ``image`` and ``mask``. ``strength`` is an extension, too."""

    model_config = ConfigDict(strict=False)  # a form holds text alone

    strength: float = Field(0.8, gt=0, le=1, description="How much is drawn anew; that part of the steps is run.")
    input_fidelity: Literal["low", "high"] = Field("low", description="Ignored: say strength instead.")


def from_form(model: type[Edited], fields: Mapping[str, str]) -> Edited:
    """The request in the text fields of a form.

    Raises:
        RequestValidationError: a field is wrong.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        errors = error.errors(include_context=False, include_url=False)
        raise RequestValidationError([{**found, "loc": ("body", *found["loc"])} for found in errors]) from error


def form_schema(model: type[EditRequest]) -> dict[str, object]:
    """JSON schema of a form with the fields of ``model`` and its files."""
    schema = model.model_json_schema()
    file = {"type": "string", "format": "binary"}
    image = file | {"description": "PNG, JPEG or WebP to start from."}
    mask = file | {"description": "Picture that is transparent where the image is to be drawn anew."}
    schema["properties"] |= {"image": image, "mask": mask}
    schema["required"] = [*schema.get("required", ()), "image"]
    return schema


class ImageData(BaseModel):
    """One drawn image."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="With it, the same request draws the same image.")


class ImageResponse(BaseModel):
    """Answer to a request for images."""

    created: int = Field(description="Seconds since 1970.")
    data: list[ImageData]
    size: str
    steps: int
    output_format: str
    background: Literal["opaque"] = "opaque"


class ModelCard(BaseModel):
    """Description of the served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fp4dit_ao"


class ModelList(BaseModel):
    """Answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of the health checks."""

    status: str


class ErrorBody(BaseModel):
    """Description of an error, in OpenAI's shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Answer to a failed request."""

    error: ErrorBody


class ApiError(Exception):
    """Error that is answered in OpenAI's shape.

    Attributes:
        status: HTTP status code.
        body: JSON of the answer.
        retry_after: seconds after which to try again; None if trying again would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        kind = {401: "authentication_error", 429: "rate_limit_error", 504: "timeout_error"}.get(status)
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.status, self.retry_after = status, retry_after
        self.body: dict[str, object] = ErrorResponse(
            error=ErrorBody(message=message, type=kind, param=param, code=code)
        ).model_dump()


def encode(image: Image, output_format: str, compression: int) -> bytes:
    """Encodes ``image`` as a picture file; ``compression`` is the quality in percent, for jpeg and webp."""
    file = io.BytesIO()
    options: dict[str, int] = {} if output_format == "png" else {"quality": compression}
    Pillow.fromarray(image).save(file, output_format, **options)
    return file.getvalue()
