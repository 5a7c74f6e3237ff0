"""Multipart forms and the pictures in them: bodies of ``POST /v1/images/edits``."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from starlette.exceptions import HTTPException
from starlette.requests import Request

from fp4dit_ao.serving.engine_types import Image
from fp4dit_ao.serving.schema import ApiError

MOST_PIXELS = 4096 * 4096
"""Largest picture that is read."""


async def form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """Text fields and files of a multipart form (RFC 7578), by name; brackets at the end of a name are dropped.

    Raises:
        ApiError: it is no such form, or names a field twice.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(400, "the body must be a form, with Content-Type: multipart/form-data", "invalid_form")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form() as found:
            for key, value in found.multi_items():
                name = key.removesuffix("[]")
                if name in fields or name in files:
                    message = f"the form gives {name} twice; one picture is edited at a time"
                    raise ApiError(400, message, "invalid_form", name)
                if isinstance(value, str):
                    fields[name] = value
                else:
                    files[name] = await value.read()
    except HTTPException as error:  # of python-multipart
        raise ApiError(400, f"the form cannot be read: {error.detail}", "invalid_form") from error
    return fields, files


def picture(data: bytes, name: str) -> Pillow.Image:
    """The picture in a file, as RGBA.

    Raises:
        ApiError: it is none, or too large.
    """
    try:
        opened = Pillow.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if opened.width * opened.height > MOST_PIXELS:
            raise ApiError(400, f"{name} has {opened.width}x{opened.height} pixels, too many", "invalid_image", name)
        return opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ApiError(400, f"{name} is no PNG, JPEG or WebP picture", "invalid_image", name) from error


def pixels(opened: Pillow.Image, size: tuple[int, int]) -> Image:
    """RGB values of a picture, resized to (width, height)."""
    return np.asarray(opened.convert("RGB").resize(size, Pillow.Resampling.LANCZOS))


def hole(mask: Pillow.Image, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a picture is transparent, which is where it is to be drawn anew, resized to (width, height)."""
    return np.asarray(mask.getchannel("A").resize(size, Pillow.Resampling.NEAREST)) == 0
